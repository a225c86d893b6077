"""Samples as data workers make them: the contract of every kind, and the maker that replaces unusable ones."""

import abc
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pretrain.data.bad_samples import BadSample
from pretrain.data.crashes import Decoding
from pretrain.data.fetch import RawSample, SampleReader
from pretrain.data.handover import join
from pretrain.data.index import Shard
from pretrain.data.members import Members, parse_sample
from pretrain.data.order import EpochOrder
from pretrain.data.randomness import generator
from pretrain.errors import DataError, SampleError
from pretrain.recipe.schema import Data, Source
from pretrain.runtime.activity import note

#: A micro-batch: tensors [B, ...] by name, index columns and lists such as `key`; see `Samples.collate`.
Batch = dict[str, Any]
#: Arrays [views, ...] of one sample by name.
Arrays = dict[str, np.ndarray]
#: The generator of a sample and view for a purpose ("crop", say).
Draw = Callable[[str], np.random.Generator]


@dataclass(frozen=True)
class Place:
    """A position of the order and where its sample lies."""

    epoch: int
    position: int
    source: int
    shard: int
    row: int


@dataclass(frozen=True)
class Sample:
    """A finished sample: arrays [views, ...] by name, and a record of every unusable sample that came before it."""

    place: Place
    key: str
    arrays: Arrays
    bad: list[BadSample] = field(default_factory=list)


@dataclass(frozen=True)
class SourceInfo:
    """A data set as a sample sees it: its name, its shards, and its section of the recipe."""

    name: str
    shards: Sequence[Shard]
    options: Source


class Samples(abc.ABC):
    """A kind of sample: from the members of one to the rows of a batch.

    Picklable, because data workers are spawned. What is random comes from generators keyed by (seed, epoch, position,
    view, purpose), never from a worker's own state: else another number of ranks or a resume would change the batch.

    Attributes:
        in_blocks: a micro-batch holds neighbouring positions, for what its samples have in common (mixing, batch norm);
            else these go to neighbouring ranks, which keeps the reads of a rank closer together.
        motion_sources: numbers of the sources whose samples must come with their motion curves (`Members.motion`).
    """

    in_blocks: bool = False
    motion_sources: frozenset[int] = frozenset()

    @abc.abstractmethod
    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        """Make arrays [views, ...] by name.

        Args:
            place: of the sample in the order, and where it lies, also a substitute; what is random is keyed by its
                epoch and position.
            source: data set of the sample.
            members: files of the sample.

        Raises:
            SampleError: the sample can't be used.
        """

    @abc.abstractmethod
    def example(self, count: int) -> Batch:
        """Make a micro-batch of `count` samples with made-up content, for plans, checks and profiles."""

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Make the one row [1, ...] by which the sample is judged: no random crop, mask or mirror.

        Rows of all samples have one shape: they are joined without `collate`.

        Raises:
            SampleError: the sample can't be used.
        """
        raise NotImplementedError

    def collate(self, samples: list[Sample]) -> Batch:
        """Join samples to a micro-batch: the views of each lie next to each other, B = samples x views.

        Returns:
            the tensors [B, ...]; `position`, `view`, `source`, `epoch` int64 [B]; `key` list of B; `bad` the records of
            unusable samples. A kind with ragged parts pads or lists them here.
        """
        columns = _columns([sample.arrays for sample in samples])
        views = len(next(iter(samples[0].arrays.values())))
        # Joined together: what is joined at once travels to the rank as one piece.
        return join(columns | _index_arrays(samples, views)) | _records(samples, views)


def index_columns(samples: list[Sample], views: int) -> Batch:
    """Say where the rows of a micro-batch come from; see `Samples.collate`."""
    return join(_index_arrays(samples, views)) | _records(samples, views)


def _index_arrays(samples: list[Sample], views: int) -> dict[str, list[np.ndarray]]:
    def each(values: Iterable[int]) -> list[np.ndarray]:
        return [np.repeat(np.fromiter(values, dtype=np.int64), views)]

    return {
        "position": each(sample.place.position for sample in samples),
        "epoch": each(sample.place.epoch for sample in samples),
        "source": each(sample.place.source for sample in samples),
        "view": [np.tile(np.arange(views, dtype=np.int64), len(samples))],
    }


def _records(samples: list[Sample], views: int) -> Batch:
    return {
        "key": [sample.key for sample in samples for _ in range(views)],
        "bad": [bad for sample in samples for bad in sample.bad],
    }


def made_up_samples(count: int, arrays: Callable[[Place], Arrays]) -> list[Sample]:
    """Make samples at the first positions of the first epoch, for `Samples.example`."""
    places = [Place(0, position, 0, 0, position) for position in range(count)]
    return [Sample(place, f"made_up_{place.position}", arrays(place)) for place in places]


def draws(seed: int, place: Place, views: int) -> list[Draw]:
    """Build the generator factories of a sample's views."""
    return [functools.partial(generator, seed, place.epoch, place.position, view) for view in range(views)]


def stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Stack the arrays of all views, [views, ...]; a single one, which is most of a sample's bytes, is not copied."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def joined(rows: list[Arrays]) -> Batch:
    """Join the arrays of several samples to tensors, one after the other; see `handover.join`."""
    return dict(join(_columns(rows)))


def _columns(rows: list[Arrays]) -> dict[str, list[np.ndarray]]:
    return {name: [arrays[name] for arrays in rows] for name in rows[0]}


class SampleMaker:
    """Maker of samples that replaces those that can't be used.

    Args:
        data: The recipe's data section.
        sources: The sources, in the recipe's order.
        reader: Fetches substitutes.
        samples: What to make of a sample.
        decoding: Notes what is decoded, and knows what kills its decoder.
    """

    def __init__(
        self, data: Data, sources: list[SourceInfo], reader: SampleReader, samples: Samples, decoding: Decoding
    ) -> None:
        self._data, self._sources, self._reader = data, sources, reader
        self._samples, self._decoding = samples, decoding

    def make(self, place: Place, order: EpochOrder, fetched: Callable[[], RawSample]) -> Sample:
        """Make the sample of a place, or its first usable substitute.

        Args:
            place: Position and location.
            order: Order of the place's epoch, which knows the substitutes.
            fetched: Gives the bytes of the place's own sample, or raises SampleError.

        Raises:
            DataError: all data.bad_attempts substitutes are unusable as well.
        """
        bad: list[BadSample] = []
        shard, row, read = place.shard, place.row, fetched
        for attempt in range(self._data.bad_attempts + 1):
            if attempt:
                # Not read ahead: whether a substitute is needed shows only when the sample before it has failed.
                shard, row = order.substitute(place.source, place.position, attempt)
                read = functools.partial(self._reader.read, place.source, shard, row)
            try:
                note(f"data: reading position {place.position} of epoch {place.epoch}")
                raw = read()
                note(f"data: decoding {raw.key} of {raw.url}")
                # Reading stays outside: its deadline is its own, and a slow store must not count as a hung decoder.
                # Only films in place are read on in here, and for less than the deadline (linked_video.PATIENCE).
                with self._decoding.of((place.source, shard, row)):
                    # Where the substitute lies: what is looked up beside the shards would else be another sample's.
                    there = replace(place, shard=shard, row=row)
                    arrays = self._samples(there, self._sources[place.source], parse_sample(raw))
                return Sample(place, raw.key, arrays, bad)
            except SampleError as error:
                bad.append(self._record(place, shard, row, attempt, error))
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(b.reason for b in bad).most_common())
        raise DataError(
            f"source {bad[0].source}: the sample at position {place.position} of epoch {place.epoch} (shard "
            f"{bad[0].shard}, key {bad[0].key}) and its {self._data.bad_attempts} substitutes are all unusable "
            f"({reasons}; last: {bad[-1].detail}); check the source with launch/pack.py --check"
        )

    def _record(self, place: Place, shard: int, row: int, attempt: int, error: SampleError) -> BadSample:
        source = self._sources[place.source]
        # Not the key in the bytes: what was read may be another sample, or no sample at all.
        key = self._reader.key(place.source, shard, row)
        detail = str(error).removeprefix(f"{error.reason}: ")
        return BadSample(
            source.name, source.shards[shard].name, key, place.epoch, place.position, attempt, error.reason, detail
        )
