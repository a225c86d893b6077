"""Held-out samples of some shards, each once, dealt out to ranks and workers, in batches to judge."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from finetune.recipe import TuneRecipe
from pretrain.data.fetch import RawSample, SampleReader, read_ahead
from pretrain.data.index import ShardIndex, load_index
from pretrain.data.members import Members, parse_sample
from pretrain.data.samples import Batch, Place, Sample, Samples, SourceInfo
from pretrain.data.stream import prepare_worker
from pretrain.errors import DataError, SampleError
from pretrain.recipe.schema import Source

logger = logging.getLogger(__name__)

#: Unreadable samples that a message lists.
SHOWN_UNREADABLE = 5


@dataclass(frozen=True)
class HeldOutSet:
    """Shards to judge: name of the source, its index, its section of the recipe."""

    name: str
    index: ShardIndex
    options: Source


@dataclass(frozen=True)
class Judgeable:
    """Some samples: a batch of those that can be read, none if none can, and `key: reason` of the others."""

    batch: Batch | None
    unreadable: list[str]

    def pin_memory(self) -> "Judgeable":
        """Copy to page-locked memory; torch's DataLoader calls it where there is an accelerator."""
        if self.batch is None:
            return self
        pinned = {name: value.pin_memory() if isinstance(value, torch.Tensor) else value
                  for name, value in self.batch.items()}  # fmt: skip
        return Judgeable(pinned, self.unreadable)


def held_out_sets(recipe: TuneRecipe, test: bool) -> list[HeldOutSet]:
    """Open the validation or test shards of the sources that have some.

    Raises:
        DataError: shards are not there.
    """
    found = []
    for name, source in recipe.data.sources.items():
        shards = (source.test or source.val) if test else source.val
        if shards:
            found.append(HeldOutSet(name, load_index(shards), source))
    return found


def report_unreadable(unreadable: list[str], judged: int, recipe: TuneRecipe, what: str) -> None:
    """Say which held-out samples are in no score.

    Args:
        unreadable: `key: reason` of each.
        judged: samples that could be read.
        recipe: the run; data.bad_rate is the most of them that may be missing.
        what: they are, for messages.

    Raises:
        DataError: none could be read, or too few.
    """
    every, some = len(unreadable) + judged, "; ".join(unreadable[:SHOWN_UNREADABLE])
    if not judged:
        raise DataError(f"evaluation: none of {every} {what} could be read: {some}")
    if not unreadable:
        return
    # bad_minimum: of few samples a single bad one is already more than the rate.
    if len(unreadable) >= recipe.data.bad_minimum and len(unreadable) > recipe.data.bad_rate * every:
        raise DataError(
            f"evaluation: {len(unreadable)} of {every} {what} can't be read, more than data.bad_rate="
            f"{recipe.data.bad_rate:g}: {some}"
        )
    logger.warning("evaluation: %d of %d %s can't be read and are in no score: %s", len(unreadable), every, what, some)


class HeldOutSamples(IterableDataset[Judgeable]):
    """Samples of a rank: of all in a row, number rank, rank + world_size, ...

    Args:
        sets: what to judge.
        samples: makes the rows.
        rank: this rank.
        world_size: number of ranks.
        micro: samples of a batch.
        deadline_s: longest time of one read, seconds.
        readahead: samples fetched ahead of decoding.
    """

    def __init__(
        self, sets: list[HeldOutSet], samples: Samples, rank: int, world_size: int, micro: int, deadline_s: float,
        readahead: int = 8,
    ) -> None:  # fmt: skip
        self._sets, self._samples, self._rank, self._world_size = sets, samples, rank, world_size
        self._micro, self._deadline_s, self._readahead = micro, deadline_s, readahead

    def __len__(self) -> int:
        """Count the samples of this rank."""
        return len(self._positions(0, 1))

    def batches(self, workers: int) -> int:
        """Count the batches of the rank that has most."""
        first = HeldOutSamples(self._sets, self._samples, 0, self._world_size, self._micro, self._deadline_s)
        each = [len(first._positions(worker, max(workers, 1))) for worker in range(max(workers, 1))]
        return sum(-(-count // self._micro) for count in each)

    def members(self) -> Iterator[Members | None]:
        """Read what one sample after the other is made of, without decoding; None: it can't be read."""
        reader = SampleReader([one.index for one in self._sets], None, self._deadline_s)
        for place in self._places(0, 1):
            try:
                yield parse_sample(reader.read(place.source, place.shard, place.row))
            except SampleError:
                yield None

    def __iter__(self) -> Iterator[Judgeable]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = SampleReader([one.index for one in self._sets], None, self._deadline_s)

        def read(place: Place) -> RawSample:
            return reader.read(place.source, place.shard, place.row)

        rows: list[Sample] = []
        unreadable: list[str] = []
        for place, future in read_ahead(self._places(worker, workers), read, self._readahead):
            entry = self._sets[place.source]
            key = f"{entry.name}/{entry.index.shards[place.shard].name.removesuffix('.tar')}/{{}}"
            key = key.format(reader.key(place.source, place.shard, place.row))
            try:
                members = parse_sample(future.result())
                source = SourceInfo(entry.name, entry.index.shards, entry.options)
                rows.append(Sample(place, key, self._samples.without_chance(source, members)))
            except SampleError as error:
                # Training would replace it; a score must be of each sample once, and say which are missing.
                unreadable.append(f"{key}: {error}")
            if len(rows) + len(unreadable) == self._micro:
                yield self._batch(rows, unreadable)
                rows, unreadable = [], []
        if rows or unreadable:
            yield self._batch(rows, unreadable)

    def _batch(self, rows: list[Sample], unreadable: list[str]) -> Judgeable:
        return Judgeable(self._samples.collate(rows) if rows else None, unreadable)

    def _places(self, worker: int, workers: int) -> Iterator[Place]:
        ends = np.cumsum([0, *(count for one in self._sets for count in one.index.shards.samples.tolist())])
        shards = [(s, number) for s, one in enumerate(self._sets) for number in range(len(one.index.shards))]
        for position in self._positions(worker, workers):
            unit = int(np.searchsorted(ends, position, side="right")) - 1
            yield Place(0, position, *shards[unit], position - int(ends[unit]))

    def _positions(self, worker: int, workers: int) -> range:
        # By rank first: how many workers a rank has changes nothing of what it judges.
        every = sum(one.index.samples for one in self._sets)
        return range(self._rank + worker * self._world_size, every, self._world_size * workers)


def held_out_loader(samples: HeldOutSamples, workers: int) -> "DataLoader[Any]":
    """Load samples by worker processes."""
    return DataLoader(
        samples,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # A fork would copy locks that threads of CUDA and of the collectives hold at that moment.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=prepare_worker if workers else None,
    )
