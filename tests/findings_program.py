"""What modules of tests find out on several ranks, each `findings(ranks)` of one, in one start of processes.

    RANK=… WORLD_SIZE=… python findings_program.py worlds|engines FOLDER MODULE [MODULE ...]

`worlds`: on four, two and one gloo ranks, one world after the other. `engines`: on all ranks, joined as a run joins
them. FOLDER/<module> <world size>-<rank>.pt gets what each rank found.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.runtime.process_group import Ranks, join, leave


def worlds(folder: Path) -> Iterator[Ranks]:
    """This process in one world after the other, for as long as it is in them."""
    rank = int(os.environ["RANK"])
    for world_size in (4, 2, 1):
        if rank >= world_size:
            return
        if world_size > 1:
            store = dist.FileStore(str(folder / f"store {world_size}"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        # A world of one has no process group here: any collective would raise.
        yield Ranks(rank, world_size, rank, torch.device("cpu"))
        if world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def engines(folder: Path) -> Iterator[Ranks]:
    """This process among all."""
    ranks = join()
    yield ranks
    leave(ranks)


def main(kind: str, folder: Path, *modules: str) -> None:
    """Let each module find out what it does in each world."""
    for ranks in {"worlds": worlds, "engines": engines}[kind](folder):
        for name in modules:
            found = importlib.import_module(name).findings(ranks)
            torch.save(found, folder / f"{name} {ranks.world_size}-{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
