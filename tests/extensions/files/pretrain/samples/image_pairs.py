"""Two random crops of a picture, side by side."""

from dataclasses import dataclass

import numpy as np

from pretrain.data.decoders.image import decode_image
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, Samples, SourceInfo, draws, made_up_samples, stacked
from pretrain.recipe.schema import Input
from pretrain.samples.transforms import centre_crop, crop_resize, multiscale_box


@dataclass
class Config(Input):
    """Pairs of crops."""

    name: str = "image_pairs"
    """kind of sample: pretrain/samples/<name>.py"""
    height: int = 32
    """height of a crop after resizing, pixels"""
    width: int = 32
    """width of a crop after resizing, pixels"""
    views: int = 2
    """crops of each picture"""

    @property
    def size(self) -> tuple[int, int, int]:
        """A picture is a clip of one frame."""
        return 1, self.height, self.width

    def describe(self) -> list[tuple[str, str, str]]:
        return [("pixels", f"{self.height} x {self.width}", f"{self.views} crops of a picture")]


class ImagePairs(Samples):
    """`video` uint8 [B, 1, H, W, 3]; the crops of a picture are neighbours."""

    def __init__(self, options: Config, seed: int) -> None:
        self._options, self._seed = options, seed

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        picture, options = decode_image(members.image()), self._options
        crops = []
        for draw in draws(self._seed, place, options.views):
            box = multiscale_box(picture.shape[2], picture.shape[1], options.width, options.height, draw("crop"))
            crops.append(crop_resize(picture, box, options.width, options.height))
        return {"video": stacked(crops)}

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        return {"video": centre_crop(decode_image(members.image()), self._options.width, self._options.height)[None]}

    def example(self, count: int) -> Batch:
        size = (self._options.views, *self._options.size, 3)
        return self.collate(
            made_up_samples(
                count, lambda place: {"video": generator(place.position).integers(256, size=size, dtype=np.uint8)}
            )
        )
