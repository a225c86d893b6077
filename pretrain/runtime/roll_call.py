"""Roll call of the ranks before the process group is made: its own timeout tells that some are missing, but not who."""

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

#: Missing ranks that a message lists.
LISTED = 16


def roll_call(environ: Mapping[str, str], timeout_s: float) -> dist.Store:
    """Wait for all ranks at MASTER_ADDR:MASTER_PORT.

    Returns:
        The store in which they met; keep it until the process group is made, which shares its server.

    Raises:
        RuntimeError: rank 0 can't be reached, or some ranks have not come within `timeout_s`; rank 0 names them.
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
    store.set(_key(rank), socket.gethostname())
    if rank:
        # One key that rank 0 sets: every rank waiting for all others would be world_size^2 requests to one server.
        store.wait([_key("all")], timeout)
        return store
    try:
        store.wait([_key(other) for other in range(world_size)], timeout)
    except RuntimeError as error:
        missing = [other for other in range(world_size) if not store.check([_key(other)])]
        hosts = sorted({store.get(_key(other)).decode() for other in range(world_size) if other not in missing})
        listed = ", ".join(map(str, missing[:LISTED])) + (" and more" if len(missing) > LISTED else "")
        raise RuntimeError(
            f"{len(missing)} of {world_size} ranks have not come: {listed}; others are on {', '.join(hosts[:LISTED])}"
        ) from error
    store.set(_key("all"), "here")
    return store


def _key(rank: int | str) -> str:
    return f"tubelet/here/{rank}"
