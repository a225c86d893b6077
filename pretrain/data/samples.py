"""One sample from bytes to the views of a batch: tar parsing, decoding once, then a crop and masks for each view."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.bad_samples import BadSample
from pretrain.data.crashes import Decoding
from pretrain.data.decoders import open_video
from pretrain.data.decoders.crops import Box
from pretrain.data.fetch import RawSample, SampleReader
from pretrain.data.index import Shard
from pretrain.data.members import Members, parse_sample
from pretrain.data.order import EpochOrder
from pretrain.data.randomness import generator
from pretrain.errors import DataError, SampleError
from pretrain.recipe.schema import Data
from pretrain.runtime.activity import note
from pretrain.samples import sampling, transforms

#: The generator of a sample and view for a purpose ("crop", say).
Draw = Callable[[str], np.random.Generator]
#: An objective's draws for one view: (purpose -> generator of this sample and view) -> named arrays.
ViewTensors = Callable[[Draw], dict[str, np.ndarray]]


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
    arrays: dict[str, np.ndarray]
    bad: list[BadSample]


@dataclass(frozen=True)
class SourceInfo:
    """What making a sample needs to know of its source: name, shards, stride in frames."""

    name: str
    shards: Sequence[Shard]
    stride: int


class SampleViews:
    """Makes all views of one sample by a rule of its own, where cropping and an objective's draws are not all it takes.

    Fine-tuning's labels and augmentations, for example. Picklable, because data workers are spawned.
    """

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> dict[str, np.ndarray]:
        """Arrays [views, ...] by name, `video` uint8 [views, T, H, W, 3] among them.

        Args:
            place: the sample's place in the order; what is random is keyed by its epoch and position.
            source: the sample's data set.
            members: the sample's files.

        Raises:
            SampleError: the sample can't be used.
        """
        raise NotImplementedError


class SampleMaker:
    """Makes samples; replaces those that can't be used.

    Args:
        data: The recipe's data section.
        seed: The recipe's run.seed.
        sources: The sources, in the recipe's order.
        reader: Fetches substitutes.
        view_tensors: The objective's draws for one view, or what makes the views altogether.
        decoding: Notes what is decoded, and knows what kills its decoder.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        sources: list[SourceInfo],
        reader: SampleReader,
        view_tensors: ViewTensors | SampleViews,
        decoding: Decoding,
    ) -> None:
        self._decoding = decoding
        self._data, self._sources, self._reader = data, sources, reader
        self._views: SampleViews = (
            view_tensors if isinstance(view_tensors, SampleViews) else CroppedViews(data, seed, view_tensors)
        )

    def make(self, place: Place, order: EpochOrder, fetched: Callable[[], RawSample]) -> Sample:
        """The sample of a place, or its first usable substitute.

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
                shard, row = order.substitute(place.source, place.position, attempt)
                read = functools.partial(self._reader.read, place.source, shard, row)
            try:
                note(f"data: reading position {place.position} of epoch {place.epoch}")
                raw = read()
                note(f"data: decoding {raw.key} of {raw.url}")
                with self._decoding.of((place.source, shard, row)):
                    arrays = self._views(place, self._sources[place.source], parse_sample(raw))
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
        key = self._reader.key(place.source, shard, row)
        detail = str(error).removeprefix(f"{error.reason}: ")
        return BadSample(
            source.name, source.shards[shard].name, key, place.epoch, place.position, attempt, error.reason, detail
        )


class CroppedViews(SampleViews):
    """Pre-training: one clip, decoded once; a crop and the objective's draws for each view.

    Args:
        data: The recipe's data section.
        seed: The recipe's run.seed.
        view_tensors: The objective's draws for one view.
    """

    def __init__(self, data: Data, seed: int, view_tensors: ViewTensors) -> None:
        self._data, self._seed, self._view_tensors = data, seed, view_tensors

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> dict[str, np.ndarray]:
        draws = [
            functools.partial(generator, self._seed, place.epoch, place.position, view)
            for view in range(self._data.views)
        ]
        drawn = [self._view_tensors(draw) for draw in draws]
        arrays = {"video": _stacked(self._videos(place, source.stride, members, draws))}
        return arrays | {name: _stacked([view[name] for view in drawn]) for name in drawn[0]}

    def _videos(self, place: Place, stride: int, members: Members, draws: Sequence[Draw]) -> list[transforms.Clip]:
        """One clip as each view shows it, [T, H, W, 3]; decoded once, its start drawn once (repeated augmentation)."""
        data = self._data
        rng = generator(self._seed, place.epoch, place.position, 0, "clip")
        step, phase = members.grid if data.grid == "auto" else (1, 0)
        with open_video(members.video(), data.decoder, members.stamps) as reader:
            every = sampling.clip_starts(reader.num_frames, data.frames, stride)
            starts = sampling.grid_starts(every, stride, step, phase)
            start = starts[int(rng.integers(len(starts)))]
            frames = sampling.clip_frames(reader.num_frames, data.frames, stride, start)
            if data.crop == "center":
                clip = transforms.centre_crop(reader.frames(frames), data.width, data.height)
                return [clip] * len(draws)
            clips = reader.crops(frames, functools.partial(self._boxes, draws))
        return [transforms.resize(clip, data.width, data.height) for clip in clips]

    def _boxes(self, draws: Sequence[Draw], width: int, height: int) -> list[Box]:
        data = self._data
        return [transforms.multiscale_box(width, height, data.width, data.height, draw("crop")) for draw in draws]


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    """Arrays of all views, [views, ...]; a single one, which is most of a sample's bytes, is not copied."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)
