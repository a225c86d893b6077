"""Clips of videos: decoded once, cropped for each view, with what the method draws beside them.

Sizes and crops: systems/videomae.md sections 5 and 6, from the datasets of OpenGVLab/VideoMAEv2.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.data.decoders import Decoder, VideoReader, open_video, why_missing
from pretrain.data.decoders.crops import Box
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Draw, Place, Samples, SourceInfo, draws, made_up_samples, stacked
from pretrain.recipe.schema import Input, Source
from pretrain.samples import sampling, transforms

#: Most bytes of a clip's pixels: far beyond what is trained, and near what ends a host that only counts tokens.
LARGEST_CLIP = 1 << 32
#: What a method draws for one view beside its pixels, mask indices for example: named arrays.
ViewTensors = Callable[[Draw], dict[str, np.ndarray]]


@dataclass
class Config(Input):
    """Clips of videos: size, sampling, decoding."""

    name: str = "clip"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 16
    """frames of a clip, T"""
    stride: int = 4
    """frames of the video between two frames of the clip; unused where fps is given"""
    fps: float | None = None
    """frames of the clip a second, by time stamp, so that sources of any rate show the same seconds; null: by stride. A
    video that is too short repeats its last frame, one of a lower rate each of its frames"""
    height: int = 224
    """height of a clip after crop and resize, pixels"""
    width: int = 224
    """width of a clip after crop and resize, pixels"""
    views: int = 1
    """crops and masks drawn from each decoded clip (repeated augmentation)"""
    crop: Literal["multiscale", "center"] = "multiscale"
    """multiscale: the official MultiScaleCrop; center: short side resized, centre cut"""
    decoder: Decoder = "pyav"
    """library that decodes video; torchcodec_cuda: on the GPU, where each data worker takes memory of its own; give
    data.workers a number (not measured yet: bench/loader_decoders.py)"""
    grid: Literal["auto", "off"] = "auto"
    """auto: clips of a video that pack.py encoded begin on its grid of reference frames (random phase for each video),
    which decodes faster; off: at any frame, as published"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = [
            f"input.{name}: found {getattr(self, name)}, allowed: more than 0"
            for name in ("frames", "stride", "fps", "height", "width", "views")
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf
        ]
        if not found and (size := 3 * self.frames * self.height * self.width) > LARGEST_CLIP:
            found.append(
                f"input.frames, input.height, input.width: found {self.frames} x {self.height} x {self.width}, "
                f"{size / 1e9:,.1f} GB of pixels for each clip, allowed: up to {LARGEST_CLIP / 1e9:.1f} GB"
            )
        missing = why_missing(self.decoder)
        return [*found, f"input.decoder: {missing}"] if missing else found

    def source_problems(self, name: str, source: Source) -> list[str]:
        """Say what in a source's section can't work beside this one."""
        if self.fps is None or source.stride is None:
            return []
        found = f"data.sources.{name}.stride: found {source.stride}, allowed: null where input.fps={self.fps:g}"
        return [f"{found} says which frames a clip has"]

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a clip is."""
        size = f"{self.frames} x {self.height} x {self.width}"
        rate = f"every {self.stride} frames of the video" if self.fps is None else f"{self.fps:g} frames a second"
        return [("pixels", size, rate)]

    def describe_source(self, source: Source) -> str:
        """Say at which stride a source is sampled."""
        return f"stride {source.stride or self.stride}" if self.fps is None else f"{self.fps:g} frames a second"

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return self.frames, self.height, self.width


class ClipSamples(Samples):
    """One clip, decoded once; a crop and the method's draws for each view.

    A batch holds `video` uint8 [B, T, H, W, 3], and what the method draws.

    Args:
        options: The recipe's input section.
        seed: The recipe's run.seed.
        view_tensors: The method's draws for one view; picklable.
    """

    def __init__(self, options: Config, seed: int, view_tensors: ViewTensors | None = None) -> None:
        self._options, self._seed, self._view_tensors = options, seed, view_tensors

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        each = draws(self._seed, place, self._options.views)
        return {"video": stacked(self._videos(place, source, members, each))} | self._drawn(each)

    def example(self, count: int) -> Batch:
        def arrays(place: Place) -> Arrays:
            each = draws(self._seed, place, self._options.views)
            return {"video": made_up_videos(self._options, self._options.views)} | self._drawn(each)

        return self.collate(made_up_samples(count, arrays))

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Cut the centre crop of the clip in the middle of the video, `video` uint8 [1, T, H, W, 3]."""
        options = self._options
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            clip = reader.frames(middle_frames(reader, options, source.options.stride or options.stride))
        return {"video": transforms.centre_crop(clip, options.width, options.height)[None]}

    def _drawn(self, each: Sequence[Draw]) -> Arrays:
        if self._view_tensors is None:
            return {}
        drawn = [self._view_tensors(draw) for draw in each]
        return {name: stacked([view[name] for view in drawn]) for name in drawn[0]}

    def _videos(
        self, place: Place, source: SourceInfo, members: Members, each: Sequence[Draw]
    ) -> list[transforms.Clip]:
        """Make one clip as each view shows it, [T, H, W, 3]; decoded once, at one start (repeated augmentation)."""
        options = self._options
        rng = generator(self._seed, place.epoch, place.position, 0, "clip")
        stride = source.options.stride or options.stride
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            frames = random_frames(reader, options, stride, members.grid, rng)
            if options.crop == "center":
                clip = transforms.centre_crop(reader.frames(frames), options.width, options.height)
                # Nothing of a centre crop is drawn: views differ by what the method draws beside them.
                return [clip] * len(each)
            # Boxes before frames: only what they hold is converted to RGB.
            clips = reader.crops(frames, functools.partial(self._boxes, each))
        return [transforms.resize(clip, options.width, options.height) for clip in clips]

    def _boxes(self, each: Sequence[Draw], width: int, height: int) -> list[Box]:
        options = self._options
        return [transforms.multiscale_box(width, height, options.width, options.height, draw("crop")) for draw in each]


def random_frames(
    reader: VideoReader, options: Config, stride: int, grid: tuple[int, int], rng: np.random.Generator
) -> sampling.Indices:
    """Draw which frames of a video a clip holds.

    Args:
        reader: The video.
        options: By rate where `fps` is given, else by stride.
        stride: Of the source.
        grid: Step and phase of the video's reference frames.
        rng: The sample's.
    """
    if options.fps is not None:
        duration = reader.duration
        start = float(rng.random()) * sampling.latest_start(duration, options.frames, options.fps)
        return reader.indices_at(sampling.clip_times(duration, options.frames, options.fps, start))
    step, phase = grid if options.grid == "auto" else (1, 0)
    every = sampling.clip_starts(reader.num_frames, options.frames, stride)
    starts = sampling.grid_starts(every, stride, step, phase)
    return sampling.clip_frames(reader.num_frames, options.frames, stride, starts[int(rng.integers(len(starts)))])


def middle_frames(reader: VideoReader, options: Config, stride: int) -> sampling.Indices:
    """Give the frames of the clip in the middle of a video; arguments as for `random_frames`."""
    if options.fps is not None:
        duration = reader.duration
        start = sampling.latest_start(duration, options.frames, options.fps) / 2
        return reader.indices_at(sampling.clip_times(duration, options.frames, options.fps, start))
    start = (sampling.clip_starts(reader.num_frames, options.frames, stride) - 1) // 2
    return sampling.clip_frames(reader.num_frames, options.frames, stride, start)


def made_up_videos(options: Config, views: int) -> transforms.Clip:
    """Make noise in the size of clips, uint8 [views, T, H, W, 3]: flat pictures would hide what normalisation does."""
    one = generator("made-up video").integers(256, size=(1, *options.size, 3), dtype=np.uint8)
    return np.repeat(one, views, axis=0)
