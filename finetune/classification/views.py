"""Labelled clips of a sample: the training views, and the views of validation and test."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.classification.labels import LabelMap
from finetune.classification.mixing import MIX_SEEDS, mix_seeds
from finetune.recipe import TuneRecipe
from pretrain.data.decoders import open_video
from pretrain.data.held_out import HeldOutRows, HeldOutSamples, HeldOutSet
from pretrain.data.linked_video import Footage
from pretrain.data.members import Members
from pretrain.data.motion_tables import Curve
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Draw, Place, Sample, Samples, SourceInfo, made_up_samples
from pretrain.samples import transforms
from pretrain.samples.augment import mirrors
from pretrain.samples.clip import made_up_videos
from pretrain.samples.frame_choice import FrameChoice, VideoFacts
from pretrain.samples.picture_transforms import evaluated_picture
from pretrain.samples.transforms import Clip, Geometry


@dataclass(frozen=True)
class SourceRules:
    """Rules of a labelled source for its videos, resolved.

    Attributes:
        labels: what the loss takes of them.
        choice: of frames.
        flip: mirror half of the training clips.
        short_side: of validation frames before their centre is cut, pixels.
        geometry: of the frames that videos are judged by.
        mirrored: class of a mirrored clip of each class; None: the same.
    """

    labels: LabelMap
    choice: FrameChoice
    flip: bool
    short_side: int
    geometry: Geometry = "videomae"
    mirrored: tuple[int, ...] | None = None
    #: Pillow's filter, for pictures, which are judged by their middle alone; None: clips.
    picture_filter: str | None = None


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
        self.motion_sources = frozenset(number for number, rule in enumerate(rules) if rule.choice.needs_motion)

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        rules = self._rules[place.source]
        target = rules.labels.target(members.label)
        # View 0 for all: the clip is drawn and decoded once, its views differ in augmentation alone.
        rng = generator(self._seed, place.epoch, place.position, 0, "clip")
        with open_video(members.footage(), self._input.decoder, members.stamps) as reader:
            clip = reader.frames(rules.choice.training(VideoFacts(reader.num_frames, members.motion), rng))
        views = range(self._input.views)
        return {
            "video": np.stack([self._view(place, view, clip, rules.flip) for view in views]),
            "target": np.stack([self._target_of(place, view, target, rules) for view in views]),
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
        made: Clip = self._input.training_view(clip, self._augment, flip, self._draw(place, view))
        return made

    def _target_of(self, place: Place, view: int, target: Any, rules: SourceRules) -> Any:
        """Exchange left and right in the target of a view that is mirrored."""
        if rules.mirrored is None or self._input.crop == "center":
            return target
        if not mirrors(rules.flip, self._draw(place, view)):
            return target
        exchange = np.array(rules.mirrored)
        return exchange[target] if self._target.task == "single" else target[exchange]

    def _draw(self, place: Place, view: int) -> Draw:
        return functools.partial(generator, self._seed, place.epoch, place.position, view)


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
    def height(self) -> int:
        """Height of a clip, pixels."""
        return self.size[1]

    @property
    def width(self) -> int:
        """Width of a clip, pixels."""
        return self.size[2]

    def __call__(self, video: Footage, rules: SourceRules, key: str, motion: Curve | None = None) -> Clip:
        """Cut views uint8 [clips * crops, T, H, W, 3] of a video, the crops of a clip next to each other.

        Args:
            video: to judge.
            rules: of its source.
            key: of the video: rules with random clips choose the same ones in every test, whoever runs it.
            motion: its raw motion, where that is known and the rule looks at it.
        """
        with open_video(video, self.decoder) as reader:
            facts = VideoFacts(reader.num_frames, motion)
            if self.validation or rules.picture_filter is not None:
                return self._middle(reader.frames(rules.choice.validation(facts)), rules)[None]
            indices = rules.choice.clips(facts, self.clips, generator(key, "test clips"))
            # Clips overlap: every frame is decoded once.
            wanted, where = np.unique(indices, return_inverse=True)
            frames = reader.frames(wanted)
        return np.stack([view for rows in where.reshape(indices.shape) for view in self._crops(frames[rows], rules)])

    def _crops(self, clip: Clip, rules: SourceRules) -> list[Clip]:
        if self.height != self.width:
            return [transforms.centre_crop(clip, self.width, self.height)]
        if rules.geometry == "videomae":
            return transforms.spatial_views(_resize_short(clip, self.height, "videomae"), self.height, self.crops)
        if self.crops == 1:
            # As in validation: 224 pixels in the middle of frames of 256.
            return [self._centre(clip, rules.short_side, "tsn")]
        return transforms.quarter_views(_resize_short(clip, self.height, "tsn"), self.height)

    def _middle(self, clip: Clip, rules: SourceRules) -> Clip:
        if rules.picture_filter is None:
            return self._centre(clip, rules.short_side, rules.geometry)
        return evaluated_picture(clip[0], self.height, rules.short_side, rules.picture_filter)[None]

    def _centre(self, clip: Clip, short_side: int, geometry: Geometry = "videomae") -> Clip:
        """Resize the short side and cut the middle; a plain fit where that would not cover."""
        if short_side < max(self.height, self.width):
            return transforms.centre_crop(clip, self.width, self.height)
        resized = _resize_short(clip, short_side, geometry)
        y = transforms.centred(resized.shape[1] - self.height)
        x = transforms.centred(resized.shape[2] - self.width)
        # A copy: a view would keep all of the resized clip in memory, and be sent to the trainer with it.
        return np.ascontiguousarray(resized[:, y : y + self.height, x : x + self.width])


def _resize_short(clip: Clip, short: int, geometry: Geometry) -> Clip:
    # VideoMAE's official code resizes by OpenCV, without antialiasing; TSN's by Pillow.
    return transforms.resize_short(clip, short, antialias=geometry == "tsn")


@dataclass(frozen=True)
class VideoSet(HeldOutSet):
    """Shards to evaluate, and the rules of their source."""

    rules: SourceRules


@dataclass(frozen=True)
class VideoRows(HeldOutRows[dict[str, Any], dict[str, Any]]):
    """Videos one by one: `key`, `target`, `views` uint8 [V, T, H, W, 3] of each."""

    sets: Sequence[VideoSet]
    views: EvaluationViews

    def make(self, place: Place, key: str, members: Members) -> dict[str, Any]:
        rules = self.sets[place.source].rules
        target = rules.labels.target(members.label)
        # By the sample's own key: shards may be packed anew, and the clips of a test stay.
        views = self.views(members.footage(), rules, members.key, members.motion)
        return {"key": key, "target": torch.from_numpy(target), "views": torch.from_numpy(views)}

    def collate(self, made: list[dict[str, Any]]) -> dict[str, Any]:
        (video,) = made
        return video


def held_out_videos(
    sets: Sequence[VideoSet], views: EvaluationViews, rank: int, world_size: int, deadline_s: float
) -> HeldOutSamples[dict[str, Any]]:
    """Read a rank's part of the videos, views and not videos filling the batches of a model; see `VideoRows`."""
    motion = [number for number, one in enumerate(sets) if one.rules.choice.needs_motion]
    return HeldOutSamples(sets, VideoRows(sets, views), rank, world_size, 1, deadline_s, motion=motion)
