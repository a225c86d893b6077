"""Held-out samples of some shards, each once, dealt out to ranks and workers, in batches to judge."""

import abc
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pretrain.data.fetch import RawSample, SampleReader, read_ahead
from pretrain.data.index import ShardIndex, load_index
from pretrain.data.members import Members, parse_sample
from pretrain.data.samples import Arrays, Batch, Place, Sample, Samples, SourceInfo, joined
from pretrain.data.stream import prepare_worker
from pretrain.errors import SampleError
from pretrain.recipe.schema import Source
from pretrain.runtime.process_group import Ranks

logger = logging.getLogger(__name__)

M = TypeVar("M")
B = TypeVar("B")

#: Samples decoded at a time, ahead of the network, where threads of the rank itself decode.
DECODERS = 4


@dataclass(frozen=True)
class HeldOutSet:
    """Shards to judge: name of the source, its index, its section of the recipe."""

    name: str
    index: ShardIndex
    options: Source

    @property
    def source(self) -> SourceInfo:
        """The set as a sample sees it."""
        return SourceInfo(self.name, self.index.shards, self.options)


@dataclass(frozen=True)
class Unreadable:
    """A sample that can't be used: its key as source/shard/key, its own key, and the reason."""

    key: str
    own_key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Judgeable(Generic[B]):
    """Some samples: a batch of those that can be read, None if none can, and the others."""

    batch: B | None
    unreadable: list[Unreadable]

    def pin_memory(self) -> "Judgeable[Any]":
        """Copy to page-locked memory; torch's DataLoader calls it where there is an accelerator."""
        if not isinstance(self.batch, dict):
            return self
        pinned = {name: value.pin_memory() if isinstance(value, Tensor) else value
                  for name, value in self.batch.items()}  # fmt: skip
        return Judgeable(pinned, self.unreadable)


class HeldOutRows(abc.ABC, Generic[M, B]):
    """What becomes of held-out samples; picklable, because data workers are spawned."""

    @abc.abstractmethod
    def make(self, place: Place, key: str, members: Members) -> M:
        """Make what is judged of a sample.

        Args:
            place: its position among all samples of all sets, number of its set, shard and row.
            key: source/shard/key.
            members: files of the sample.

        Raises:
            SampleError: the sample can't be used.
        """

    @abc.abstractmethod
    def collate(self, made: list[M]) -> B:
        """Join what was made of some samples, at least one, to a batch."""


@dataclass(frozen=True)
class RowsWithoutChance(HeldOutRows[Sample, Batch]):
    """Rows of a kind of sample without anything random, collated as in training."""

    sets: Sequence[HeldOutSet]
    samples: Samples

    def make(self, place: Place, key: str, members: Members) -> Sample:
        return Sample(place, key, self.samples.without_chance(self.sets[place.source].source, members))

    def collate(self, made: list[Sample]) -> Batch:
        return self.samples.collate(made)


class HeldOutSamples(IterableDataset[Judgeable[B]], Generic[B]):
    """Samples of a rank: of all in a row, number rank, rank + world_size, ...

    Args:
        sets: what to judge.
        rows: makes the batches.
        rank: this rank.
        world_size: number of ranks.
        micro: samples of a batch.
        deadline_s: longest time of one read, seconds.
        readahead: samples fetched ahead of decoding, or, with `threaded`, decoded ahead.
        motion: numbers of the sets whose samples come with their motion curves.
        threaded: decode by threads of this process, not by the one that iterates.
    """

    def __init__(
        self, sets: Sequence[HeldOutSet], rows: HeldOutRows[Any, B], rank: int, world_size: int, micro: int,
        deadline_s: float, *, readahead: int = 8, motion: Collection[int] = (), threaded: bool = False,
    ) -> None:  # fmt: skip
        self._sets, self._rows, self._rank, self._world_size = sets, rows, rank, world_size
        self._micro, self._deadline_s, self._readahead = micro, deadline_s, readahead
        self._motion, self._threaded = motion, threaded

    def __len__(self) -> int:
        """Count the samples of this rank."""
        return len(self._positions(self._rank, 0, 1))

    def batches(self, workers: int) -> int:
        """Count the batches of the rank that has most: the first."""
        workers = max(workers, 1)
        return sum(math.ceil(len(self._positions(0, worker, workers)) / self._micro) for worker in range(workers))

    def __iter__(self) -> Iterator[Judgeable[B]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = SampleReader([one.index for one in self._sets], None, self._deadline_s, motion=self._motion)

        def read(place: Place) -> RawSample:
            return reader.read(place.source, place.shard, place.row)

        def read_and_make(place: Place) -> Any:
            return self._made(reader, place, read(place))

        made: list[Any] = []
        unreadable: list[Unreadable] = []
        places = self._places(worker, workers)
        for place, future in read_ahead(places, read_and_make if self._threaded else read, self._readahead):
            try:
                found = future.result()
                made.append(found if self._threaded else self._made(reader, place, found))
            except SampleError as error:
                # Training would replace it; a score must be of each sample once, and say which are missing.
                own_key = reader.key(place.source, place.shard, place.row)
                unreadable.append(Unreadable(self._key(reader, place), own_key, str(error)))
            if len(made) + len(unreadable) == self._micro:
                yield self._batch(made, unreadable)
                made, unreadable = [], []
        if made or unreadable:
            yield self._batch(made, unreadable)

    def _made(self, reader: SampleReader, place: Place, raw: RawSample) -> Any:
        return self._rows.make(place, self._key(reader, place), parse_sample(raw))

    def _key(self, reader: SampleReader, place: Place) -> str:
        entry = self._sets[place.source]
        shard = entry.index.shards[place.shard].name.removesuffix(".tar")
        return f"{entry.name}/{shard}/{reader.key(place.source, place.shard, place.row)}"

    def _batch(self, made: list[Any], unreadable: list[Unreadable]) -> Judgeable[B]:
        return Judgeable(self._rows.collate(made) if made else None, unreadable)

    def _places(self, worker: int, workers: int) -> Iterator[Place]:
        ends = np.cumsum([0, *(count for one in self._sets for count in one.index.shards.samples.tolist())])
        shards = [(s, number) for s, one in enumerate(self._sets) for number in range(len(one.index.shards))]
        for position in self._positions(self._rank, worker, workers):
            unit = int(np.searchsorted(ends, position, side="right")) - 1
            yield Place(0, position, *shards[unit], position - int(ends[unit]))

    def _positions(self, rank: int, worker: int, workers: int) -> range:
        # By rank first: how many workers a rank has changes nothing of what it judges.
        every = sum(one.index.samples for one in self._sets)
        return range(rank + worker * self._world_size, every, self._world_size * workers)


def held_out_loader(samples: HeldOutSamples[Any], workers: int) -> "DataLoader[Any]":
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


@dataclass(frozen=True)
class HeldOutBatch:
    """Rows that are judged together: tensors [B, ...] by name, their numbers in the set, labels.

    A sample without a label has an empty one, where labels are not asked for.
    """

    rows: Batch
    numbers: list[int]
    labels: list[str]


#: Number of the sample in the set, label, arrays [1, ...].
LabelledRow = tuple[int, str, Arrays]


@dataclass(frozen=True)
class LabelledRows(HeldOutRows[LabelledRow, HeldOutBatch]):
    """The one row by which a sample of a set is judged, and its label; `required`: one without can't be used."""

    source: SourceInfo
    samples: Samples
    required: bool

    def make(self, place: Place, key: str, members: Members) -> LabelledRow:
        label = members.label
        if label is None and not self.required:
            label = ""
        # To Python a bool is an int, but no class is called True.
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise SampleError("label", f"{label!r} is no class name or number")
        return place.position, str(label), self.samples.without_chance(self.source, members)

    def collate(self, made: list[LabelledRow]) -> HeldOutBatch:
        numbers, labels, arrays = zip(*made, strict=True)
        return HeldOutBatch(joined(list(arrays)), list(numbers), list(labels))


class HeldOut:
    """Samples of one folder of shards, a part of which each rank has.

    Args:
        name: for messages.
        shards: folder, any fsspec URL.
        samples: makes the row of a sample, by `without_chance`.
        ranks: this process among all.
        micro: rows of a batch.
        deadline_s: longest time of one read, seconds.
        labelled: leave samples without a label out, with a warning.

    Raises:
        DataError: the shards can't be read.
    """

    def __init__(
        self, name: str, shards: str, samples: Samples, ranks: Ranks, micro: int, deadline_s: float,
        labelled: bool = True,
    ) -> None:  # fmt: skip
        self._name, self._samples, self._ranks = name, samples, ranks
        found = HeldOutSet(name, load_index(shards), Source(shards=shards))
        self.url = found.index.url
        rows = LabelledRows(found.source, samples, labelled)
        # Decoded by threads of this process: of a small set, workers would take longer to start than to read it.
        self._held_out = HeldOutSamples([found], rows, ranks.rank, ranks.world_size, micro, deadline_s,
                                        readahead=DECODERS, threaded=True)  # fmt: skip

    @property
    def most_batches(self) -> int:
        """Most batches that any rank has: samples that can't be used make them fewer on one rank and not on others."""
        return self._held_out.batches(0)

    def blank(self) -> Batch:
        """Make a row of made-up content, for forward passes in which a rank without samples takes part."""
        made_up = self._samples.example(1).items()
        return {name: value[:1].to(self._ranks.device) for name, value in made_up if isinstance(value, Tensor)}

    def batches(self) -> Iterator[HeldOutBatch]:
        """Read this rank's samples, to its device."""
        for some in self._held_out:
            for one in some.unreadable:
                logger.warning("%s: %s can't be used: %s", self._name, one.own_key, one.reason)
            if some.batch is not None:
                rows = {name: value.to(self._ranks.device) for name, value in some.batch.rows.items()}
                yield HeldOutBatch(rows, some.batch.numbers, some.batch.labels)
