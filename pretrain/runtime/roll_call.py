"""Roll call of the ranks before the process group is made: its own timeout tells that some are missing, but not who."""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from pretrain.errors import TrainingError

#: Missing ranks that a message lists.
LISTED = 16

#: Longest time that rank 0 waits for the others to read what is wrong, seconds.
READ_S = 10

#: Rank 0's word that all have come.
HERE = "here"


def roll_call(environ: Mapping[str, str], timeout_s: float, backend: str) -> dist.Store:
    """Wait for all ranks at MASTER_ADDR:MASTER_PORT.

    Args:
        environ: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
        timeout_s: longest time to wait.
        backend: by which this rank will talk; ranks of two back ends would wait for each other until that ends.

    Returns:
        The store in which they met; keep it until the process group is made, which shares its server.

    Raises:
        RuntimeError: rank 0 can't be reached, or some ranks have not come within `timeout_s`; rank 0 names them.
        TrainingError: ranks came with another back end than most; all ranks name them.
    """
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    # torchrun's agent serves the store itself.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)
    # No wait_for_workers, which names nobody. multi_tenant: init_distributed opens a store at the same port.
    store = dist.TCPStore(
        environ["MASTER_ADDR"],
        int(environ["MASTER_PORT"]),
        world_size,
        serves,
        timeout,
        wait_for_workers=False,
        multi_tenant=True,
    )
    store.set(_key(rank), f"{socket.gethostname()} {backend}")
    if rank:
        # One key that rank 0 sets: every rank waiting for all others would be world_size^2 requests to one server.
        store.wait([_key("all")], timeout)
        if (problem := store.get(_key("all")).decode()) != HERE:
            store.set(_key(f"{rank} has read"), "")
            raise TrainingError(problem)
        return store
    try:
        store.wait([_key(other) for other in range(world_size)], timeout)
    except RuntimeError as error:
        missing = [other for other in range(world_size) if not store.check([_key(other)])]
        hosts = sorted({_met(store, other)[0] for other in range(world_size) if other not in missing})
        listed = ", ".join(map(str, missing[:LISTED])) + (" and more" if len(missing) > LISTED else "")
        raise RuntimeError(
            f"{len(missing)} of {world_size} ranks have not come: {listed}; others are on {', '.join(hosts[:LISTED])}"
        ) from error
    problem = _different([_met(store, other) for other in range(world_size)])
    store.set(_key("all"), problem or HERE)
    if problem:
        # The server ends with this rank: the others would be told of a lost connection instead.
        with contextlib.suppress(RuntimeError):
            store.wait([_key(f"{other} has read") for other in range(1, world_size)], timedelta(seconds=READ_S))
        raise TrainingError(problem)
    return store


def _met(store: dist.Store, rank: int) -> tuple[str, str]:
    """Read host and back end of a rank that has come."""
    host, backend = store.get(_key(rank)).decode().rsplit(" ", 1)
    return host, backend


def _different(ranks: list[tuple[str, str]]) -> str:
    """Name the ranks that talk by another back end than most; an empty string where all are alike."""
    usual = Counter(backend for _, backend in ranks).most_common(1)[0][0]
    odd = [f"rank {rank} on {host} ({backend})" for rank, (host, backend) in enumerate(ranks) if backend != usual]
    if not odd:
        return ""
    more = f" and {len(odd) - LISTED} more" if len(odd) > LISTED else ""
    return (
        f"{len(ranks) - len(odd)} of {len(ranks)} ranks talk by {usual}, and not {', '.join(odd[:LISTED])}{more}: nccl "
        "is for GPUs, gloo for CPUs. Check that all hosts show their GPUs and have the same DS_ACCELERATOR"
    )


def _key(rank: int | str) -> str:
    return f"tubelet/here/{rank}"
