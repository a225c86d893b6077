"""Pictures as image models are trained on them: timm's transforms, several augmented views of one decoded picture."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.recipe.schema import Source
from pretrain.samples import augmented_clip
from pretrain.samples.picture_checks import picture_problems
from pretrain.samples.picture_transforms import evaluated_picture, training_picture
from pretrain.samples.pixel_augment import PixelAugment
from pretrain.samples.transforms import Clip


@dataclass
class Config(augmented_clip.Config):
    """Pictures, one frame each: size, and timm's transforms beside the section `augment`."""

    name: str = "picture"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 1
    """frames of a clip; a picture is one"""
    views: int = 1
    """augmented views of each decoded picture (repeated augmentation; DeiT: 3)"""
    crop: Literal["resized", "center"] = "resized"  # type: ignore[assignment]
    """training: random area and aspect, or center: as evaluated, and not augmented"""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Pillow's filter when pictures are resized, rotated and sheared; random: one of the two at each operation of
    training (timm's default), and bicubic in evaluation"""
    colour_jitter: float = 0.4
    """largest change of brightness, contrast and saturation, as a share; as in timm it rests where augment.randaugment
    is on; 0: none"""
    erase_with: Literal["pixel", "colour", "mean"] = "pixel"
    """content of erased boxes: noise in every pixel, one random colour, the mean colour (timm: pixel, rand, const)"""
    erase_boxes: int = 1
    """most boxes erased in a picture, which share the area (timm's recount)"""
    crop_share: float = 0.875
    """evaluation: side of the middle that is cut out, as a share of the resized picture's short side (timm's crop_pct;
    0.875 = 224/256)"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = super().problems()
        otherwise = " (of videos: input.name=augmented_clip)"
        found += picture_problems(self, self.crop_share, "timm's transforms make squares", otherwise)
        if not 0 <= self.colour_jitter < math.inf:
            found.append(f"input.colour_jitter: found {self.colour_jitter}, allowed: 0 or more")
        if self.erase_boxes < 1:
            found.append(f"input.erase_boxes: found {self.erase_boxes}, allowed: 1 or more (none: augment.erasing=0)")
        return found

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a picture is."""
        judged = f"evaluated: short side {self.evaluated_side}, middle cut out"
        return [("pixels", f"{self.height} x {self.width}", f"{self.interpolation}; {judged}")]

    def describe_source(self, source: Source) -> str:
        """Say nothing: a picture has no stride."""
        return ""

    @property
    def evaluated_side(self) -> int:
        """Short side of evaluated pictures before the middle is cut out, pixels, rounded down as in timm."""
        return math.floor(self.height / self.crop_share)

    @property
    def evaluated_filter(self) -> str:
        """Pillow's filter of evaluated pictures."""
        return "bicubic" if self.interpolation == "random" else self.interpolation

    def training_view(
        self, clip: Clip, augment: PixelAugment, flip: bool, draw: Callable[[str], np.random.Generator]
    ) -> Clip:
        """Make one training view of a decoded picture, uint8 [1, H, W, 3]."""
        if self.crop == "center":
            return evaluated_picture(clip[0], self.height, self.evaluated_side, self.evaluated_filter)[None]
        return training_picture(clip[0], self, augment, flip, draw)[None]
