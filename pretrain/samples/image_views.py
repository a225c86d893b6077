"""Two augmented views of a picture, or of two clips of a video, as contrastive methods compare them.

Source: systems/snclr.md, section 4; the pair of augmentations is MoCo-v3's and BYOL's.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pretrain.data.decoders import VideoReader, open_video
from pretrain.data.decoders.crops import Box
from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Draw, Place, Samples, SourceInfo, draws, made_up_samples, stacked
from pretrain.recipe.schema import Source
from pretrain.samples import clip
from pretrain.samples.picture_transforms import evaluated_picture
from pretrain.samples.sampling import Indices
from pretrain.samples.transforms import Clip
from pretrain.samples.view_augment import ViewAugment, augmented_view, view_box, view_problems

VIEWS = 2


@dataclass
class Config(clip.Config):
    """Pictures (one frame) or clips: two views of each, augmented each in its own way."""

    name: str = "image_views"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 1
    """frames of a clip; a picture is one"""
    views: int = VIEWS
    """views of a sample, which stand together in a batch: the first one's and the second one's"""
    crop: Literal["resized", "center"] = "resized"  # type: ignore[assignment]
    """resized: random area and aspect, augmented; center: both views as held-out samples are cut, not augmented"""
    clips: Literal["own", "same"] = "own"
    """own: each view shows a clip of its own of a video; same: both show the same one"""
    first: ViewAugment = field(default_factory=ViewAugment)
    """augmentation of the first view"""
    second: ViewAugment = field(default_factory=lambda: ViewAugment(blur=0.1, solarise=0.2))
    """augmentation of the second view"""
    crop_share: float = 0.875
    """held-out samples: side of the middle that is cut out, as a share of the resized frame's short side (0.875:
    resized to 256 for 224)"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = super().problems()
        if self.views != VIEWS:
            found.append(f"input.views: found {self.views}, allowed: {VIEWS}, a pair of views")
        if self.height != self.width:
            found.append(
                f"input.height={self.height}, input.width={self.width}: allowed: one number for both; views are squares"
            )
        if not 0 < self.crop_share <= 1:
            found.append(f"input.crop_share: found {self.crop_share}, allowed: above 0 and at most 1")
        return found + view_problems("input.first", self.first) + view_problems("input.second", self.second)

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a view is."""
        if self.frames == 1:
            return [("pixels", f"{self.height} x {self.width}", "two views of a picture")]
        name, size, rate = super().describe()[0]
        return [(name, size, f"two views, {'each of its own clip' if self.clips == 'own' else 'of one clip'}; {rate}")]

    def describe_source(self, source: Source) -> str:
        """Say at which stride a source of clips is sampled; a picture has none."""
        return "" if self.frames == 1 else super().describe_source(source)


class ImageViews(Samples):
    """Two views of each sample, side by side.

    A batch holds `video` uint8 [B, T, H, W, 3], rows 0, 2, … the first views and 1, 3, … the second ones.

    Args:
        options: the recipe's input section.
        seed: the recipe's run.seed.
    """

    def __init__(self, options: Config, seed: int) -> None:
        self._options, self._seed = options, seed

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        options = self._options
        each = draws(self._seed, place, VIEWS)
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            chosen = [self._frames(reader, source, members, draw) for draw in each]
            if options.clips == "same":
                chosen[1] = chosen[0]
            if options.crop == "center":
                return {"video": stacked([self._middle(reader.frames(frames)) for frames in chosen])}
            crops = self._crops(reader, chosen, each)
        size = (options.width, options.height)
        pairs = zip(crops, self._augments, each, strict=True)
        return {"video": stacked([augmented_view(crop, size, how, draw) for crop, how, draw in pairs])}

    def example(self, count: int) -> Batch:
        video = clip.made_up_videos(self._options, VIEWS)
        return self.collate(made_up_samples(count, lambda place: {"video": video}))

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Cut the middle out of the picture, or of the clip in the middle of the video, `video` [1, T, H, W, 3]."""
        options = self._options
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            frames = clip.middle_frames(reader, options, source.options.stride or options.stride)
            return {"video": self._middle(reader.frames(frames))[None]}

    @property
    def _augments(self) -> tuple[ViewAugment, ViewAugment]:
        return self._options.first, self._options.second

    def _frames(self, reader: VideoReader, source: SourceInfo, members: Members, draw: Draw) -> Indices:
        options = self._options
        if options.frames == 1:
            # Any frame: one that clips of more would begin with leaves out a video's end.
            return np.array([draw("clip").integers(reader.num_frames)])
        return clip.random_frames(reader, options, source.options.stride or options.stride, members.grid, draw("clip"))

    def _crops(self, reader: VideoReader, chosen: Sequence[Indices], each: Sequence[Draw]) -> list[Clip]:
        """Decode what the boxes of both views hold, once where they show the same frames."""
        views = list(zip(self._augments, each, strict=True))
        if np.array_equal(chosen[0], chosen[1]):
            return reader.crops(chosen[0], functools.partial(self._boxes, views))
        pairs = zip(chosen, views, strict=True)
        return [reader.crops(frames, functools.partial(self._boxes, [view]))[0] for frames, view in pairs]

    def _boxes(self, views: Sequence[tuple[ViewAugment, Draw]], width: int, height: int) -> list[Box]:
        return [view_box(width, height, options, draw) for options, draw in views]

    def _middle(self, frames: Clip) -> Clip:
        size = self._options.height
        short = math.floor(size / self._options.crop_share)
        return np.stack([evaluated_picture(frame, size, short, "bilinear") for frame in frames])
