"""Pictures with single objects: boxes, categories and masks, for detection and instance segmentation.

A sample is a picture and its `objects.json`, as `pack.py instances_train2017.json --with objects` writes them
(data/pack/instance_annotations.py). Crowds are no objects to learn; judgement leaves them out as COCO does.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.crops import Box, cut
from pretrain.data.decoders.image import decode_image
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, Sample, Samples, SourceInfo, draws, made_up_samples
from pretrain.errors import SampleError
from pretrain.recipe.schema import Input
from pretrain.runtime.untrusted import parse_json
from pretrain.samples.box_transforms import draw_hsv_shift, resized_size, shift_hsv
from pretrain.samples.instance_facts import OBJECTS, Instances, read_instances
from pretrain.samples.instance_geometry import drawn_masks, moved_objects, original_box, packed_masks
from pretrain.samples.transforms import Clip, resize

#: Sides of the picture that plans count with where nothing is cropped: most of COCO's are of this shape.
ASPECT = 4 / 3
MADE_UP_OBJECTS = 3


@dataclass
class Config(Input):
    """Pictures with objects: geometry and colour."""

    VARIES: ClassVar[bool] = True

    name: str = "instances"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 1
    """times that a model of videos is shown the picture (its model.tubelet); 1 for models of pictures"""
    short_side: int = 800
    """short side of pictures, pixels"""
    long_side: int | None = 1333
    """most pixels of the long side, for which the short one is made smaller; null: no limit"""
    train_sides: list[int] | None = None
    """training: short sides, one of which is drawn for each picture; null: short_side"""
    crop_size: int | None = None
    """training: large-scale jitter: the picture is made as large as fits into a square of this side times a factor from
    scale, and a square is cut out of it at random; null: whole pictures of train_sides"""
    scale: tuple[float, float] = (0.1, 2.0)
    """training with crop_size: range of the factor"""
    flip: float = 0.5
    """training: probability that a picture is mirrored"""
    colour: Literal["none", "hsv"] = "none"
    """training: hsv shifts hue, saturation and value of a picture"""
    pad: int = 32
    """pictures of a batch are filled up with zeros, right and below, to a multiple of this many pixels"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = [
            f"input.{name}: found {getattr(self, name)}, allowed: more than 0"
            for name in ("frames", "short_side", "long_side", "crop_size", "pad")
            if getattr(self, name) is not None and getattr(self, name) <= 0
        ]
        if self.train_sides is not None and (not self.train_sides or min(self.train_sides) <= 0):
            found.append(f"input.train_sides: found {list(self.train_sides)}, allowed: one or more numbers above 0")
        if not 0 <= self.flip <= 1:
            found.append(f"input.flip: found {self.flip}, allowed: a share from 0 to 1")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            found.append(f"input.scale: found {list(self.scale)}, allowed: two factors above 0, the smaller one first")
        if self.crop_size is not None and self.train_sides is not None:
            found.append("input.train_sides: has no effect with input.crop_size, which draws sizes by input.scale")
        if self.views != 1:
            found.append(f"input.views: found {self.views}, allowed: 1 (a picture has its own objects)")
        return found

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a picture is."""
        what = "pictures of other shapes are longer or shorter" if self.crop_size is None else "cut out at random"
        return [("pixels", " x ".join(map(str, self.size[1:])), f"{what}; boxes and masks of objects")]

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a training picture; of a usual shape where none is cropped, and the largest."""
        if self.crop_size is not None:
            return self.frames, self._padded(self.crop_size), self._padded(self.crop_size)
        side = max(self.train_sides or [self.short_side])
        width, height = resized_size(round(480 * ASPECT), 480, side, self.long_side, nearest=True)
        return self.frames, self._padded(height), self._padded(width)

    def _padded(self, side: int) -> int:
        return -(-side // self.pad) * self.pad


class InstancePictures(Samples):
    """Pictures with objects, ragged: see `collate`.

    Args:
        options: The recipe's input section.
        seed: The recipe's run.seed.
        names: of the classes.
    """

    # Batch norms of backbones may take their statistics of a micro-batch, and losses are means over one.
    in_blocks = True

    def __init__(self, options: Config, seed: int, names: list[str]) -> None:
        self._options, self._seed, self._names = options, seed, names

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        options = self._options
        picture, instances = self._read(members)
        (draw,) = draws(self._seed, place, 1)
        size, box = self._geometry(instances.width, instances.height, draw("scale"), draw("crop"))
        mirrored = draw("flip").random() < options.flip
        instances = instances.take(np.flatnonzero(~instances.crowd))
        # Cut before it is resized, which costs what is kept of the picture.
        ratios = instances.width / size[0], instances.height / size[1]
        part = original_box(box, ratios, instances.width, instances.height)
        clip = resize(cut(picture, part), box.width, box.height)
        clip = clip[:, :, ::-1] if mirrored else clip
        if options.colour == "hsv":
            clip = shift_hsv(np.ascontiguousarray(clip), *draw_hsv_shift(draw("colour")))
        boxes, masks, kept = moved_objects(instances, size, box, mirrored)
        return _picture(clip, (instances.height, instances.width), boxes, instances.labels[kept], masks)

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Make the whole picture at the size that is judged, and what is in it as annotated, by the original's pixels:
        `truth_boxes`, `truth_labels`, `truth_areas`, `truth_crowd`, `truth_masks`. Rows differ in size: join by
        `collate`.
        """
        picture, instances = self._read(members)
        height, width = instances.height, instances.width
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 1, 1), np.uint8)
        arrays = _picture(self.judged(picture), (height, width), *nothing)
        return arrays | {
            "truth_boxes": instances.boxes,
            "truth_labels": instances.labels,
            "truth_areas": instances.areas,
            "truth_crowd": instances.crowd,
            "truth_masks": packed_masks(drawn_masks(instances.segmentations, height, width)),
            "images": np.array([json.dumps(instances.image_id)]),
        }

    def judged(self, picture: Clip) -> Clip:
        """Resize a picture [1, H, W, 3] to the size at which it is judged."""
        options, (height, width) = self._options, picture.shape[1:3]
        return resize(picture, *resized_size(width, height, options.short_side, options.long_side, nearest=True))

    def of_picture(self, picture: Clip) -> Batch:
        """Make the batch of one picture [1, H, W, 3] about whose objects nothing is known, as it is judged."""
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 1, 1), np.uint8)
        arrays = _picture(self.judged(picture), (picture.shape[1], picture.shape[2]), *nothing)
        return self.collate(made_up_samples(1, lambda place: arrays))

    def collate(self, samples: list[Sample]) -> Batch:
        """Join B pictures with N objects in all.

        Returns:
            `video` uint8 [B, 1, H, W, 3], filled up right and below; `sizes` int64 [B, 2], height and width without
            that; `originals` int64 [B, 2], those of the decoded picture; `boxes` float32 [N, 4], x1 y1 x2 y2 in
            pixels, of picture after picture, `counts` int64 [B] of each; `labels` int64 [N]; `masks` uint8 [N, H,
            W / 8], eight pixels a byte; of judged pictures what `without_chance` says, with `images`, a list of B ids.
        """
        pad = self._options.pad
        most = [max(int(sample.arrays["sizes"][0, side]) for sample in samples) for side in (0, 1)]
        height, width = (-(-side // pad) * pad for side in most)
        rows = [replace(sample, arrays=_padded(sample.arrays, height, width)) for sample in samples]
        # Words are no tensors.
        images = [parse_json(str(name)) for row in rows for name in row.arrays.pop("images", ())]
        return super().collate(rows) | ({"images": images} if images else {})

    def example(self, count: int) -> Batch:
        _, height, width = self._options.size

        def arrays(place: Place) -> Arrays:
            rng = generator("made-up objects", place.position)
            clip = rng.integers(256, size=(1, height, width, 3), dtype=np.uint8)
            corners = rng.uniform(0, 0.5, (MADE_UP_OBJECTS, 2))
            boxes = np.concatenate((corners, corners + 0.4), axis=1) * (width, height, width, height)
            masks = np.zeros((MADE_UP_OBJECTS, height, width), bool)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int).tolist(), strict=True):
                mask[y1:y2, x1:x2] = True
            labels = rng.integers(len(self._names), size=MADE_UP_OBJECTS)
            return _picture(clip, (height, width), boxes.astype(np.float32), labels, packed_masks(masks))

        return self.collate(made_up_samples(count, arrays))

    def _read(self, members: Members) -> tuple[Clip, Instances]:
        picture, instances = decode_image(members.image()), read_instances(members, self._names)
        if picture.shape[1:3] != (instances.height, instances.width):
            found = f"{picture.shape[2]} x {picture.shape[1]}"
            raise SampleError(OBJECTS, f"of a picture of {instances.width} x {instances.height} pixels beside one of "
                              f"{found}; pack it as it is, without --short-side")  # fmt: skip
        return picture, instances

    def _geometry(
        self, width: int, height: int, scale: np.random.Generator, crop: np.random.Generator
    ) -> tuple[tuple[int, int], Box]:
        """Draw width and height of the resized picture, and the part of it that is kept."""
        options = self._options
        if options.crop_size is None:
            sides = options.train_sides or [options.short_side]
            side = sides[int(scale.integers(len(sides)))]
            size = resized_size(width, height, side, options.long_side, nearest=True)
            return size, Box(0, 0, *size)
        factor = options.crop_size * scale.uniform(*options.scale) / max(width, height)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        kept = min(size[0], options.crop_size), min(size[1], options.crop_size)
        x, y = int(crop.integers(size[0] - kept[0] + 1)), int(crop.integers(size[1] - kept[1] + 1))
        return size, Box(x, y, *kept)


def _picture(
    clip: Clip, original: tuple[int, int], boxes: npt.NDArray[np.float32], labels: npt.NDArray[np.int64],
    masks: npt.NDArray[np.uint8],
) -> Arrays:  # fmt: skip
    return {
        "video": np.ascontiguousarray(clip)[None],
        "sizes": np.array([clip.shape[1:3]], np.int64),
        "originals": np.array([original], np.int64),
        "boxes": boxes,
        "counts": np.array([len(boxes)], np.int64),
        "labels": labels,
        "masks": masks,
    }


def _padded(arrays: Arrays, height: int, width: int) -> Arrays:
    video, masks = arrays["video"], arrays["masks"]
    filled = np.zeros((*video.shape[:2], height, width, 3), np.uint8)
    filled[:, :, : video.shape[2], : video.shape[3]] = video
    larger = np.zeros((len(masks), height, -(-width // 8)), np.uint8)
    larger[:, : masks.shape[1], : masks.shape[2]] = masks
    return {**arrays, "video": filled, "masks": larger}
