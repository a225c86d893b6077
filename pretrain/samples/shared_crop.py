"""One random crop of a picture at two sizes, for two networks that see the same thing.

Source: systems/sparseformer_bootstrap.md, section 5.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pretrain.data.decoders import open_video
from pretrain.data.decoders.crops import Box, cut
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Draw, Place, Samples, SourceInfo, draws, made_up_samples, stacked
from pretrain.samples import clip
from pretrain.samples.augment import resized_crop_box
from pretrain.samples.picture_checks import picture_problems
from pretrain.samples.picture_transforms import FILTERS, Picture, evaluated_picture

#: Of the other network; a batch holds it where its size is another one.
SECOND = "second"


@dataclass
class Config(clip.Config):
    """Pictures, or single frames of videos, cropped and mirrored at random: at one size, and at a second one."""

    name: str = "shared_crop"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 1
    """frames of a clip; a picture is one"""
    second_size: int | None = None
    """side of the same crop for the other network (a teacher), pixels; null: as for the first"""
    crop: Literal["resized", "center"] = "resized"  # type: ignore[assignment]
    """resized: random area and aspect, mirrored at random; center: as held-out pictures are cut"""
    area: tuple[float, float] = (0.08, 1.0)
    """share of the picture that the random crop takes"""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """width / height of the random crop, drawn log-uniformly"""
    flip: bool = True
    """mirror half of the crops"""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Pillow's filter when a crop is resized"""
    crop_share: float = 0.875
    """held-out pictures: side of the middle that is cut out, as a share of the resized picture's short side (0.875:
    resized to 256 for 224; 1: CLIP)"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = super().problems() + picture_problems(self, self.crop_share, "crops are squares")
        if self.second_size is not None and self.second_size < 1:
            found.append(f"input.second_size: found {self.second_size}, allowed: more than 0")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            found.append(f"input.area: found {list(self.area)}, allowed: two shares, above 0 and at most 1, in order")
        if not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            found.append(f"input.aspect: found {list(self.aspect)}, allowed: two ratios above 0, in order")
        return found

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a picture is."""
        other = "" if self.second_size is None else f"; the same crop at {self.second_size} for the other network"
        return [("pixels", f"{self.height} x {self.width}", f"{self.interpolation}{other}")]


class SharedCrops(Samples):
    """Random crops of one picture, at both sizes.

    A batch holds `video` uint8 [B, 1, H, W, 3] and, where the second size is another one, `second` [B, 1, S, S, 3].

    Args:
        options: the recipe's input section.
        seed: the recipe's run.seed.
    """

    def __init__(self, options: Config, seed: int) -> None:
        self._options, self._seed = options, seed

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        picture = self._picture(members, generator(self._seed, place.epoch, place.position, 0, "clip"))
        if self._options.crop == "center":
            return {name: stacked([view] * self._options.views) for name, view in self._centres(picture).items()}
        views = [self._view(picture, draw) for draw in draws(self._seed, place, self._options.views)]
        return {name: stacked([view[name] for view in views]) for name in views[0]}

    def example(self, count: int) -> Batch:
        noise = generator("made-up picture").integers(256, size=(self._largest, self._largest, 3), dtype=np.uint8)
        whole = Box(0, 0, self._largest, self._largest)
        arrays = {name: stacked([view] * self._options.views) for name, view in self._sizes(noise, whole).items()}
        return self.collate(made_up_samples(count, lambda place: arrays))

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Cut the middle out of the picture, of a video's middle frame, [1, 1, H, W, 3] at both sizes."""
        return {name: view[None] for name, view in self._centres(self._picture(members, None)).items()}

    @property
    def _largest(self) -> int:
        return max(self._options.height, self._options.second_size or 0)

    def _picture(self, members: Members, rng: np.random.Generator | None) -> Picture:
        with open_video(members.footage(), self._options.decoder, members.stamps) as reader:
            frame = reader.num_frames // 2 if rng is None else int(rng.integers(reader.num_frames))
            return reader.frames([frame])[0]

    def _view(self, picture: Picture, draw: Draw) -> dict[str, Picture]:
        options = self._options
        box = resized_crop_box(picture.shape[1], picture.shape[0], options.area, options.aspect, draw("crop"))
        mirrored = options.flip and draw("flip").random() < 0.5
        # A copy: torch takes no array with negative strides.
        return {
            name: np.ascontiguousarray(view[:, :, ::-1]) if mirrored else view
            for name, view in self._sizes(picture, box).items()
        }

    def _sizes(self, picture: Picture, box: Box) -> dict[str, Picture]:
        return self._both(functools.partial(self._resized, Image.fromarray(np.ascontiguousarray(cut(picture, box)))))

    def _centres(self, picture: Picture) -> dict[str, Picture]:
        return self._both(functools.partial(self._centre, picture))

    def _both(self, make: Callable[[int], Picture]) -> dict[str, Picture]:
        options = self._options
        sizes = {"video": options.height}
        # Of one size the same pixels would travel twice.
        if options.second_size is not None and options.second_size != options.height:
            sizes[SECOND] = options.second_size
        return {name: make(size)[None] for name, size in sizes.items()}

    def _resized(self, image: Image.Image, size: int) -> Picture:
        return np.array(image.resize((size, size), FILTERS[self._options.interpolation]))

    def _centre(self, picture: Picture, size: int) -> Picture:
        short = math.floor(size / self._options.crop_share)
        return evaluated_picture(picture, size, short, self._options.interpolation)
