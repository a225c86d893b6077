"""Rates of exchange between ranks: all together, and each with its neighbour, so that a slow link names its hosts."""

import time

import torch
import torch.distributed as dist

from pretrain.runtime.findings import Finding
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.runtime.speed import synchronize

#: Bytes of one exchange, and how often it is repeated; fewer on a CPU, whose network is no InfiniBand.
SIZE = {"cpu": 8 << 20, "accelerator": 256 << 20}
REPEATS = 3

#: A link slower than this share of the usual one of its kind is worth a look.
SLOW = 0.5


def check_links(ranks: Ranks, hosts: list[str]) -> list[Finding]:
    """Measure the all-reduce of all ranks, and this rank's link to the next one."""
    if ranks.world_size == 1:
        return []
    block = torch.ones(SIZE["cpu" if ranks.device.type == "cpu" else "accelerator"] // 4, device=ranks.device)
    rate = _all_reduce_rate(block, ranks)
    links = gather_objects(ranks, _link_rate(block, ranks))
    return [
        Finding("all-reduce", "ok", f"{rate:.2f} GB/s over {ranks.world_size} ranks"),
        judge_link(ranks.rank, links, hosts),
    ]


def judge_link(rank: int, links: list[float], hosts: list[str]) -> Finding:
    """Judge a rank's link among those of its kind: within a host, or between hosts. `links[r]` is r to r + 1, GB/s."""
    size = len(links)

    def between(one: int) -> bool:
        return hosts[one] != hosts[(one + 1) % size]

    kind = "between hosts" if between(rank) else "within a host"
    alike = sorted(links[one] for one in range(size) if between(one) == between(rank))
    usual, own = alike[len(alike) // 2], links[rank]
    check, other = f"links {kind}", (rank + 1) % size
    if own >= SLOW * usual:
        return Finding(check, "ok", f"{alike[0]:.2f} to {alike[-1]:.2f} GB/s")
    value = f"{own:.2f} GB/s to rank {other} on host {hosts[other]}, usual {usual:.2f}"
    return Finding(check, "warn", value, "look at the cable, the card, NCCL_SOCKET_IFNAME and NCCL_IB_HCA of both")


def _all_reduce_rate(block: torch.Tensor, ranks: Ranks) -> float:
    """Measure the bus bandwidth of an all-reduce, GB/s: bytes that each rank has to send and receive, by time."""
    best = float("inf")
    # One more than is meant to count: connections are set up in the first.
    for _ in range(1 + REPEATS):
        dist.barrier()
        synchronize(block.device)
        started = time.perf_counter()
        dist.all_reduce(block)
        synchronize(block.device)
        best = min(best, time.perf_counter() - started)
        block.fill_(1.0)
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * block.numel() * 4
    return moved / best / 1e9


def _link_rate(block: torch.Tensor, ranks: Ranks) -> float:
    """Measure the rate from this rank to the next in the ring, GB/s, while no link next to it is busy."""
    size, rank, rate = ranks.world_size, ranks.rank, 0.0
    # Links of one round share no rank; the last one of an odd ring needs a round of its own.
    rounds = [range(0, size - 1, 2), range(1, size - 1, 2), range(size - 1, size)]
    for senders in rounds:
        dist.barrier()
        for _ in range(1 + REPEATS):
            synchronize(block.device)
            started = time.perf_counter()
            if rank in senders:
                dist.send(block, (rank + 1) % size)
                dist.recv(block[:1], (rank + 1) % size)  # so that the time is that of the whole exchange
            elif (rank - 1) % size in senders:
                dist.recv(block, (rank - 1) % size)
                dist.send(block[:1], (rank - 1) % size)
            synchronize(block.device)
            if rank in senders:
                rate = max(rate, block.numel() * 4 / (time.perf_counter() - started) / 1e9)
    return rate
