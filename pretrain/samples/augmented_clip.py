"""Clips as supervised training takes them: several augmented views of one decoded clip (`augment:` says how)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from pretrain.samples import clip, transforms
from pretrain.samples.augment import augment as augmented
from pretrain.samples.frame_choice import DenseChoice, FrameChoice, SparseChoice, StridedChoice
from pretrain.samples.motion import MotionOptions
from pretrain.samples.motion_choice import motion_choice, motion_problems
from pretrain.samples.pixel_augment import PixelAugment
from pretrain.samples.transforms import Geometry


@dataclass
class Config(clip.Config):
    """Clips of videos, augmented: size, sampling, decoding."""

    #: How frames are made smaller and cut where a video is judged.
    GEOMETRY: ClassVar[Geometry] = "videomae"

    name: str = "augmented_clip"
    """kind of sample: pretrain/samples/<name>.py"""
    views: int = 2
    """augmented views of each decoded clip (repeated augmentation, officially num_sample)"""
    crop: Literal["resized", "multiscale", "center"] = "resized"  # type: ignore[assignment]
    """resized: random area and aspect; multiscale: as in pre-training (AdaptFormer); center: short side resized, centre
    cut"""
    motion: MotionOptions = field(default_factory=MotionOptions)
    """choice of frames by motion, for sources with sampling: motion (MGSampler)"""

    @property
    def motion_window(self) -> int:
        """Neighbouring frames that are shown around each one that is chosen by motion."""
        return 1

    def frame_choice(self, sampling: str, stride: int | None) -> FrameChoice:
        """Make a source's rule.

        Args:
            sampling: of the source: dense, sparse, strided or motion.
            stride: of the source; None: this section's.
        """
        if sampling == "sparse":
            return SparseChoice(self.frames)
        if sampling == "motion":
            return motion_choice(self.frames, self.motion_window, self.motion)
        return (StridedChoice if sampling == "strided" else DenseChoice)(self.frames, stride or self.stride)

    def sampling_problems(self, name: str, sampling: str) -> list[str]:
        """Say why the source of a name can't be sampled by a rule of its recipe."""
        return []

    def training_view(
        self, clip: transforms.Clip, augment: PixelAugment, flip: bool, draw: Callable[[str], np.random.Generator]
    ) -> transforms.Clip:
        """Make one training view of a decoded clip, uint8 [T, H, W, 3].

        Args:
            clip: as decoded.
            augment: the recipe's section.
            flip: mirror every second clip.
            draw: purpose -> generator of this sample and view.
        """
        size = (self.width, self.height)
        if self.crop == "center":
            return transforms.centre_crop(clip, *size)
        return augmented(clip, augment, flip, size, draw, self.crop)

    @property
    def evaluated_side(self) -> int:
        """Short side of evaluated frames before the middle is cut out, pixels; where the source says none."""
        return self.height

    @property
    def evaluated_filter(self) -> str | None:
        """Pillow's filter of evaluated pictures; None: clips, resized as OpenCV does."""
        return None

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        problems = [*super().problems(), *motion_problems("input.motion", self.frames, self.motion_window, self.motion)]
        if self.fps is None:
            return problems
        advice = "frames are chosen by data.sources.<name>.sampling and stride here; leave input.fps out"
        return [*problems, f"input.fps: found {self.fps:g}, allowed: null; {advice}"]
