"""What a run's data workers take of this host: how many there are, and the shared memory of each."""

import logging
from dataclasses import dataclass

import torch

from pretrain.data.workers import data_workers
from pretrain.objectives.base import Method
from pretrain.runtime.cores import CoreShare, share_cores
from pretrain.runtime.host_checks import workers_with_room
from pretrain.runtime.process_group import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demand:
    """What the data workers of this host's ranks take.

    Attributes:
        workers: of this rank.
        bytes_each: shared memory that one more of each rank of this host takes.
    """

    workers: int
    bytes_each: int


def demand_of(method: Method, ranks: Ranks) -> Demand:
    """Decide how many data workers this rank has, and tell it once; all ranks call it, once they are bound to cores."""
    data, share = method.recipe.data, share_cores(ranks)
    sample = sum(value.nbytes for value in method.example(1).values() if isinstance(value, torch.Tensor))
    bytes_each = share.ranks * data.prefetch * method.recipe.batch.micro * sample
    workers = data_workers(data, share.own, workers_with_room(bytes_each))
    if data.workers is None and ranks.first:
        level = logging.INFO if workers >= share.own else logging.WARNING
        logger.log(level, "data.workers: %s", describe(workers, share))
    return Demand(workers, bytes_each)


def describe(workers: int, share: CoreShare) -> str:
    """Say where a number of data workers comes from that the recipe leaves open."""
    said = f"{workers} for each rank: {count(share.cores, 'core')} of this host / {count(share.ranks, 'rank')}"
    short = "; /dev/shm has no room for the micro-batches of more: enlarge it (docker run --shm-size, or --ipc=host)"
    return said if workers >= share.own else said + short


def count(number: int, what: str) -> str:
    """Write a number of things: `1 core`, `2 cores`."""
    return f"{number} {what}{'s' if number != 1 else ''}"
