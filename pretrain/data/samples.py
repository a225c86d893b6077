"""One sample from bytes to the views of a batch: tar parsing, decoding once, then a crop and masks for each view."""

import functools
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.data.bad_samples import BadSample
from pretrain.data.crashes import Decoding
from pretrain.data.decoders import open_video
from pretrain.data.decoders.crops import Box
from pretrain.data.fetch import RawSample, SampleReader
from pretrain.data.index import VIDEO_ENDINGS, Shard
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

    def __call__(self, place: Place, source: SourceInfo, members: dict[str, Any]) -> dict[str, np.ndarray]:
        """Arrays [views, ...] by name, `video` uint8 [views, T, H, W, 3] among them.

        Args:
            place: the sample's place in the order; what is random is keyed by its epoch and position.
            source: the sample's data set.
            members: content of the sample's files by ending, from `parse_sample`.

        Raises:
            SampleError: the sample can't be used.
        """
        raise NotImplementedError


def parse_sample(raw: RawSample) -> dict[str, Any]:
    """Members of a sample by ending, with webdataset's own tar reading and grouping.

    Raises:
        SampleError: "index" where the bytes are not the one sample that the index promises.
    """
    try:
        files = tar_file_expander([{"url": raw.url, "stream": io.BytesIO(raw.data)}])
        found: list[dict[str, Any]] = list(group_by_keys(files))
    except Exception as error:  # tarfile and webdataset raise many kinds; all mean that these bytes are no sample
        raise SampleError("index", f"{raw.url}: the range of {raw.key} is no tar member: {error.args[0]}") from error
    keys = [sample["__key__"] for sample in found]
    if keys != [raw.key]:
        raise SampleError("index", f"{raw.url}: {raw.key} promised by the index, {keys} found; index the shard again")
    return found[0]


def video_bytes(members: dict[str, Any]) -> bytes:
    """The video among a sample's members."""
    for ending, data in members.items():
        if ending.rsplit(".", 1)[-1] in VIDEO_ENDINGS:
            return bytes(data)
    endings = [ending for ending in members if not ending.startswith("__")]
    raise SampleError("index", f"no video member (.mp4 or another of {sorted(VIDEO_ENDINGS)}) among {endings}")


def label_of(members: dict[str, Any]) -> Any:
    """The label in a parsed sample's json; None without.

    Raises:
        SampleError: "label" where the json is none.
    """
    try:
        facts = json.loads(members.get("json", b"{}"))
    except ValueError as error:
        raise SampleError("label", f"the sample's json is damaged: {error}") from error
    if not isinstance(facts, dict):
        raise SampleError("label", f"the sample's json holds {type(facts).__name__}, an object is allowed")
    return facts.get("label")


def grid_of(members: dict[str, Any]) -> tuple[int, int]:
    """Step and phase of the video's grid of reference frames, as packing wrote them; (1, 0) where it has none.

    Anything else under that name in the json of foreign shards is no grid.
    """
    step, phase = _numbers(members, "grid", "step", "phase")
    return (step, phase) if step > 0 <= phase else (1, 0)


def stamps_of(members: dict[str, Any]) -> range | None:
    """Time stamps of the video's frames, as packing found them to be evenly spaced; None where it did not."""
    first, step = _numbers(members, "stamps", "first", "step")
    (frames,) = _numbers(members, None, "frames")
    if step <= 0 or frames <= 0 or abs(first) + frames * step >= 1 << 62:  # FFmpeg's time stamps have 64 bits
        return None
    return range(first, first + frames * step, step)


def _numbers(members: dict[str, Any], part: str | None, *names: str) -> list[int]:
    """Whole numbers of a part of a sample's json; -1 for each of them where one is missing or something else."""
    try:
        facts = json.loads(members.get("json", b"{}"))
        found = [(facts if part is None else facts[part])[name] for name in names]
    except (ValueError, KeyError, TypeError):
        found = [None]
    return found if all(type(number) is int for number in found) else [-1] * len(names)


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

    def __call__(self, place: Place, source: SourceInfo, members: dict[str, Any]) -> dict[str, np.ndarray]:
        draws = [
            functools.partial(generator, self._seed, place.epoch, place.position, view)
            for view in range(self._data.views)
        ]
        drawn = [self._view_tensors(draw) for draw in draws]
        arrays = {"video": _stacked(self._videos(place, source.stride, members, draws))}
        return arrays | {name: _stacked([view[name] for view in drawn]) for name in drawn[0]}

    def _videos(
        self, place: Place, stride: int, members: dict[str, Any], draws: Sequence[Draw]
    ) -> list[transforms.Clip]:
        """One clip as each view shows it, [T, H, W, 3]; decoded once, its start drawn once (repeated augmentation)."""
        data = self._data
        rng = generator(self._seed, place.epoch, place.position, 0, "clip")
        step, phase = grid_of(members) if data.grid == "auto" else (1, 0)
        with open_video(video_bytes(members), data.decoder, stamps_of(members)) as reader:
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
