"""Labelled clips of a sample: the training views, and the views of validation and test."""

import functools
from dataclasses import dataclass

import numpy as np

from finetune.classification.labels import LabelMap
from finetune.classification.mixing import MIX_SEEDS, mix_seeds
from finetune.recipe import TuneRecipe
from pretrain.data.decoders import VideoReader, open_video
from pretrain.data.linked_video import Footage
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, Sample, Samples, SourceInfo, made_up_samples
from pretrain.samples import sampling, transforms
from pretrain.samples.augment import augment
from pretrain.samples.clip import made_up_videos
from pretrain.samples.transforms import Clip


@dataclass(frozen=True)
class SourceRules:
    """Rules of a labelled source for its videos, resolved."""

    labels: LabelMap
    sampling: str
    stride: int
    flip: bool
    short_side: int


class TrainingViews(Samples):
    """One clip, decoded once, and `input.views` augmented views of it with its label.

    Args:
        recipe: the run.
        rules: those of each source, in the recipe's order.
    """

    # Partners of mixing, and batch norm's statistics in a head, are those of a micro-batch.
    in_blocks = True

    def __init__(self, recipe: TuneRecipe, rules: list[SourceRules]) -> None:
        self._input, self._augment, self._seed, self._rules = recipe.input, recipe.augment, recipe.run.seed, rules
        self._target = LabelMap(recipe.model.classes, (), recipe.objective.task)

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        rules = self._rules[place.source]
        target = rules.labels.target(members.label)
        # View 0 for all: the clip is drawn and decoded once, its views differ in augmentation alone.
        rng = generator(self._seed, place.epoch, place.position, 0, "clip")
        with open_video(members.footage(), self._input.decoder, members.stamps) as reader:
            clip = reader.frames(training_frames(reader.num_frames, self._input.frames, rules, rng))
        views = range(self._input.views)
        return {
            "video": np.stack([self._view(place, view, clip, rules.flip) for view in views]),
            "target": np.stack([target for _ in views]),
        }

    def example(self, count: int) -> Batch:
        views = self._input.views
        target = self._target.example()
        arrays = {"video": made_up_videos(self._input, views), "target": np.stack([target] * views)}
        return self.collate(made_up_samples(count, lambda place: arrays))

    def collate(self, samples: list[Sample]) -> Batch:
        places = [(sample.place.epoch, sample.place.position) for sample in samples]
        return super().collate(samples) | {MIX_SEEDS: mix_seeds(self._seed, places)}

    def _view(self, place: Place, view: int, clip: Clip, flip: bool) -> Clip:
        size = (self._input.width, self._input.height)
        if self._input.crop == "center":
            return transforms.centre_crop(clip, *size)
        draw = functools.partial(generator, self._seed, place.epoch, place.position, view)
        return augment(clip, self._augment, flip, size, draw, self._input.crop)


def training_frames(num_frames: int, frames: int, rules: SourceRules, rng: np.random.Generator) -> sampling.Indices:
    """Choose the frames of a training clip.

    Dense: the end uniform over {span, ..., n-1}; sparse: an offset in each segment; strided: the start uniform.
    """
    if rules.sampling == "sparse":
        length = sampling.sparse_segment(num_frames, frames)
        offsets = rng.integers(length, size=frames) if length else np.zeros(frames, dtype=np.int64)
        return sampling.sparse_frames(num_frames, frames, offsets)
    if rules.sampling == "strided":
        start = int(rng.integers(sampling.clip_starts(num_frames, frames, rules.stride)))
        return sampling.clip_frames(num_frames, frames, rules.stride, start)
    span = frames * rules.stride
    end = int(rng.integers(span, num_frames)) if num_frames > span else None
    return sampling.dense_frames(num_frames, frames, rules.stride, end)


def validation_frames(num_frames: int, frames: int, rules: SourceRules) -> sampling.Indices:
    """Choose the frames of the one validation clip, in the middle (V2)."""
    if rules.sampling == "sparse":
        return sampling.sparse_frames(num_frames, frames, sampling.sparse_segment(num_frames, frames) // 2)
    if rules.sampling == "strided":
        start = (sampling.clip_starts(num_frames, frames, rules.stride) - 1) // 2
        return sampling.clip_frames(num_frames, frames, rules.stride, start)
    return sampling.dense_frames(num_frames, frames, rules.stride, sampling.dense_end(num_frames, frames, rules.stride))


@dataclass(frozen=True)
class EvaluationViews:
    """Views that a video is judged by; `clips` = `crops` = 1 with `validation` is the centre view.

    Attributes:
        size: frames, height and width of a clip.
        decoder: library that decodes.
        clips: clips in time.
        crops: crops along the long side.
        validation: middle clip by the training rule, centre crop; else the official test views.
    """

    size: tuple[int, int, int]
    decoder: str
    clips: int = 1
    crops: int = 1
    validation: bool = True

    @property
    def count(self) -> int:
        """Views of a video."""
        return self.clips * self.crops

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height of a clip, pixels."""
        return self.size[1]

    @property
    def width(self) -> int:
        """Width of a clip, pixels."""
        return self.size[2]

    def __call__(self, video: Footage, rules: SourceRules) -> Clip:
        """Cut views uint8 [clips * crops, T, H, W, 3] of a video, the crops of a clip next to each other."""
        with open_video(video, self.decoder) as reader:
            if self.validation:
                clip = reader.frames(validation_frames(reader.num_frames, self.frames, rules))
                return self._centre(clip, rules.short_side)[None]
            return np.stack([view for clip in self._clips(reader, rules) for view in self._crops(clip)])

    def _clips(self, reader: VideoReader, rules: SourceRules) -> list[Clip]:
        if rules.sampling == "sparse":
            indices = sampling.sparse_views(reader.num_frames, self.frames, self.clips)
        else:
            indices = sampling.dense_views(reader.num_frames, self.frames, rules.stride, self.clips)
        # Clips overlap: every frame is decoded once.
        wanted, where = np.unique(indices, return_inverse=True)
        frames = reader.frames(wanted)
        return [frames[rows] for rows in where.reshape(indices.shape)]

    def _crops(self, clip: Clip) -> list[Clip]:
        if self.height == self.width:
            return transforms.spatial_views(_resize_short(clip, self.height), self.height, self.crops)
        return [transforms.centre_crop(clip, self.width, self.height)]

    def _centre(self, clip: Clip, short_side: int) -> Clip:
        """Resize the short side as OpenCV does and cut the middle; a plain fit where that would not cover."""
        if short_side < max(self.height, self.width):
            return transforms.centre_crop(clip, self.width, self.height)
        resized = _resize_short(clip, short_side)
        y = transforms.centred(resized.shape[1] - self.height)
        x = transforms.centred(resized.shape[2] - self.width)
        # A copy: a view would keep all of the resized clip in memory, and be sent to the trainer with it.
        return np.ascontiguousarray(resized[:, y : y + self.height, x : x + self.width])


def _resize_short(clip: Clip, short: int) -> Clip:
    # Rounded down and without antialiasing, as the official resize by OpenCV.
    height, width = clip.shape[1:3]
    if height <= width:
        return transforms.resize(clip, int(width * short / height), short, antialias=False)
    return transforms.resize(clip, short, int(height * short / width), antialias=False)
