"""Pictures with a mask of classes beside them: resized, cropped and mirrored alike, for semantic segmentation.

A sample is a picture and a member `<key>.mask.png`, as `pack.py --kind image --with mask.png=FOLDER` writes them.
Augmentation as in mmsegmentation's recipes: a random size, a crop in which no class has nearly all, mirror, colour.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.crops import Box, cut
from pretrain.data.decoders.image import decode_image
from pretrain.data.decoders.label_map import decode_label_map
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, Samples, SourceInfo, draws, made_up_samples
from pretrain.errors import SampleError
from pretrain.metrics.segmentation import NO_CLASS
from pretrain.recipe.schema import Input
from pretrain.samples.box_transforms import draw_hsv_shift, resized_size, shift_hsv
from pretrain.samples.transforms import Clip, resize

Labels = npt.NDArray[np.int16]

#: Name of the member that holds the mask.
MEMBER = "mask"
#: Crops that are drawn before one is taken in which a class has too much.
CROP_DRAWS = 10


@dataclass
class Config(Input):
    """Pictures with masks: geometry, colour, what values of a mask mean."""

    VARIES: ClassVar[bool] = True

    name: str = "picture_mask"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 1
    """times that a model of videos is shown the picture (its model.tubelet); 1 for models of pictures"""
    short_side: int = 512
    """short side of pictures, pixels; training multiplies it by a number drawn from scale"""
    long_side: int | None = 2048
    """most pixels of the long side, for which the short one is made smaller; null: no limit"""
    scale: tuple[float, float] = (0.5, 2.0)
    """training: range of the factor on the size"""
    crop_size: int = 512
    """training: side of the random square crop; a picture that is smaller is filled up with pixels of no class"""
    max_class_share: float = 0.75
    """training: a crop in which a class has more of the labelled pixels is drawn again, ten times at most; 1: never"""
    flip: float = 0.5
    """training: probability that a picture is mirrored"""
    colour: Literal["none", "hsv"] = "hsv"
    """training: hsv shifts hue, saturation and value of a picture"""
    first_class: int = 0
    """value of the first class in masks; smaller ones count nowhere (ADE20K: 1)"""
    ignored: int | None = 255
    """value in masks that counts nowhere; null: none"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = [
            f"input.{name}: found {getattr(self, name)}, allowed: more than 0"
            for name in ("frames", "short_side", "long_side", "crop_size")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        found += [
            f"input.{name}: found {getattr(self, name)}, allowed: a share from 0 to 1"
            for name in ("flip", "max_class_share")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            found.append(f"input.scale: found {list(self.scale)}, allowed: two factors above 0, the smaller one first")
        if self.views != 1:
            found.append(f"input.views: found {self.views}, allowed: 1")
        if self.first_class < 0:
            found.append(f"input.first_class: found {self.first_class}, allowed: 0 or more")
        return found

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a picture is."""
        size = f"{self.crop_size} x {self.crop_size}"
        low, high = (round(self.short_side * factor) for factor in self.scale)
        return [("pixels", size, f"crops of pictures with a short side of {low} to {high}, and their masks")]

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a training picture."""
        return self.frames, self.crop_size, self.crop_size


class MaskedPictures(Samples):
    """Pictures and labels: a batch holds `video` uint8 [B, 1, H, W, 3] and `mask` int16 [B, h, w], -1 where a pixel
    counts nowhere; in training both are of the crop's size.

    Args:
        options: The recipe's input section.
        seed: The recipe's run.seed.
        classes: Number of classes, which labels are below.
    """

    # Batch norms of heads take their statistics of a micro-batch.
    in_blocks = True

    def __init__(self, options: Config, seed: int, classes: int) -> None:
        self._options, self._seed, self._classes = options, seed, classes

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        options = self._options
        picture, labels = self._read(members)
        (draw,) = draws(self._seed, place, 1)
        height, width = labels.shape
        factor = draw("scale").uniform(*options.scale)
        short = max(1, round(options.short_side * factor))
        long = None if options.long_side is None else max(short, round(options.long_side * factor))
        scaled = resized_size(width, height, short, long, nearest=True)
        box = self._box(labels, scaled, draw("crop"))
        # Cut before it is resized, which costs what is kept of the picture.
        kept = (min(options.crop_size, scaled[0]), min(options.crop_size, scaled[1]))
        cropped = resize(cut(picture, box), *kept)
        mask = resize_labels(labels[box.y : box.y + box.height, box.x : box.x + box.width], *kept)
        if draw("flip").random() < options.flip:
            cropped, mask = cropped[:, :, ::-1], mask[:, ::-1]
        if options.colour == "hsv":
            cropped = shift_hsv(np.ascontiguousarray(cropped), *draw_hsv_shift(draw("colour")))
        return self._filled(cropped, mask)

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Make the whole picture at the size that is judged, and the mask as it is; rows differ in size."""
        picture, labels = self._read(members)
        return {"video": self.judged(picture)[None], "mask": labels[None]}

    def judged(self, picture: Clip) -> Clip:
        """Resize a picture [1, H, W, 3] to the size at which it is judged."""
        options, (height, width) = self._options, picture.shape[1:3]
        return resize(picture, *resized_size(width, height, options.short_side, options.long_side, nearest=True))

    def example(self, count: int) -> Batch:
        side = self._options.crop_size

        def arrays(place: Place) -> Arrays:
            rng = generator("made-up picture", place.position)
            picture = rng.integers(256, size=(1, 1, side, side, 3), dtype=np.uint8)
            return {"video": picture, "mask": rng.integers(self._classes, size=(1, side, side)).astype(np.int16)}

        return self.collate(made_up_samples(count, arrays))

    def _read(self, members: Members) -> tuple[Clip, Labels]:
        picture, stored = decode_image(members.image()), decode_label_map(members.image(MEMBER))
        if stored.shape != picture.shape[1:3]:
            sizes = (" x ".join(map(str, shape)) for shape in (picture.shape[1:3], stored.shape))
            raise SampleError("mask", "a picture of {} with a mask of {} pixels".format(*sizes))
        return picture, read_labels(stored, self._options, self._classes)

    def _box(self, labels: Labels, scaled: tuple[int, int], rng: np.random.Generator) -> Box:
        """Draw the part of a picture that is the crop once the picture has the size `scaled`."""
        height, width = labels.shape
        sides = [
            min(side, max(1, round(self._options.crop_size * side / new)))
            for side, new in zip((width, height), scaled, strict=True)
        ]
        for _ in range(CROP_DRAWS):
            x, y = int(rng.integers(width - sides[0] + 1)), int(rng.integers(height - sides[1] + 1))
            part = labels[y : y + sides[1], x : x + sides[0]]
            counts = np.bincount(part[part != NO_CLASS], minlength=1)
            if self._options.max_class_share == 1 or counts.max() <= self._options.max_class_share * counts.sum():
                break
        return Box(x, y, *sides)

    def _filled(self, picture: Clip, mask: Labels) -> Arrays:
        side = self._options.crop_size
        below, right = side - mask.shape[0], side - mask.shape[1]
        # Grey, ImageNet's mean, so that what was filled up is near zero once it is normalised.
        video = np.pad(picture, ((0, 0), (0, below), (0, right), (0, 0)), constant_values=114)
        labels = np.pad(mask, ((0, below), (0, right)), constant_values=NO_CLASS)
        return {"video": np.ascontiguousarray(video)[None], "mask": np.ascontiguousarray(labels)[None]}


def read_labels(stored: npt.NDArray[np.int32], options: Config, classes: int) -> Labels:
    """Turn values of a mask [H, W] into classes from 0 on, NO_CLASS where a pixel counts nowhere.

    Raises:
        SampleError: "mask": a value that is neither.
    """
    labels = stored - options.first_class
    nowhere = labels < 0 if options.ignored is None else (labels < 0) | (stored == options.ignored)
    labels = np.where(nowhere, NO_CLASS, labels)
    if (most := int(labels.max())) >= classes:
        first = options.first_class
        raise SampleError(
            "mask", f"value {most + first} in a mask; allowed: {first} to {classes - 1 + first} for {classes} classes "
            f"(model.classes, input.first_class), and {options.ignored} (input.ignored)"
        )  # fmt: skip
    return labels.astype(np.int16)


def resize_labels(labels: Labels, width: int, height: int) -> Labels:
    """Resize labels [H, W] by taking the nearest one, whose centre covers the new pixel's."""
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64)
        for new, old in zip((height, width), labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]
