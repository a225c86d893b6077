"""Geometry of pictures with objects: boxes and masks follow a resize, a crop and a mirror."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.crops import Box
from pretrain.data.instance_masks import Mask, mask_of
from pretrain.errors import SampleError
from pretrain.samples.box_transforms import CONVENTIONS, clip_boxes
from pretrain.samples.instance_facts import OBJECTS, Instances

#: Pixels of a side below which a box is none that could be learned.
LEAST_SIDE = 1e-2


def moved_objects(
    instances: Instances, size: tuple[int, int], box: Box, mirrored: bool
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Follow a resize, a crop and a mirror with boxes and masks; objects of which nothing is left are dropped.

    Args:
        instances: objects, by the original picture's pixels.
        size: width and height of the resized picture.
        box: part of it that is kept.
        mirrored: the part is mirrored.

    Returns:
        boxes float32 [n, 4], packed masks [n, H, W / 8], and which objects they are, int64 [n].
    """
    scale = np.array([size[0] / instances.width, size[1] / instances.height])
    masks = [_moved_mask(one, instances, scale, box) for one in instances.segmentations]
    boxes = (instances.boxes * np.tile(scale, 2) - np.array([box.x, box.y] * 2)).astype(np.float32)
    boxes = clip_boxes(boxes, box.width, box.height, CONVENTIONS["continuous"])
    if (box.width, box.height) != size:
        # Of what the crop has cut in two the box is that of the part that is left.
        parts = [_extent(mask, one) for mask, one in zip(masks, boxes, strict=True)]
        boxes = np.array(parts, np.float32).reshape(-1, 4)
    large = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST_SIDE).all(1)
    kept = np.flatnonzero(large & np.array([bool(mask.any()) for mask in masks], bool))
    drawn = np.stack([masks[row] for row in kept]) if len(kept) else np.zeros((0, box.height, box.width), bool)
    boxes = boxes[kept]
    if mirrored:
        drawn, boxes = drawn[:, :, ::-1], boxes.copy()
        boxes[:, [0, 2]] = box.width - boxes[:, [2, 0]]
    return boxes, packed_masks(drawn), kept


def _moved_mask(segmentation: Any, instances: Instances, scale: npt.NDArray[np.float64], box: Box) -> Mask:
    try:
        if isinstance(segmentation, list):
            # Drawn where the polygon comes to lie: a mask drawn before would be resized in steps of its pixels.
            moved = [(np.reshape(one, (-1, 2)) * scale - (box.x, box.y)).reshape(-1) for one in segmentation]
            return mask_of(moved, box.height, box.width)
        whole = mask_of(segmentation, instances.height, instances.width)
    except ValueError as error:
        raise SampleError(OBJECTS, str(error)) from error
    rows, columns = (
        np.minimum((np.arange(first, first + count) + 0.5) / one, last - 1).astype(np.int64)
        for first, count, one, last in (
            (box.y, box.height, scale[1], instances.height), (box.x, box.width, scale[0], instances.width)
        )
    )  # fmt: skip
    return whole[rows[:, None], columns]


def _extent(mask: Mask, box: npt.NDArray[np.float32]) -> tuple[float, float, float, float]:
    """Find the box of a mask, no larger than the box that it is known to lie in."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0, 0, 0, 0
    return (max(float(columns[0]), float(box[0])), max(float(rows[0]), float(box[1])),
            min(float(columns[-1] + 1), float(box[2])), min(float(rows[-1] + 1), float(box[3])))  # fmt: skip


def original_box(box: Box, ratios: tuple[float, float], width: int, height: int) -> Box:
    """Find the pixels of the original that a part of the resized picture shows; all of it for all of it."""
    x, y = (min(int(round(start * ratio)), side - 1)
            for start, ratio, side in zip((box.x, box.y), ratios, (width, height), strict=True))  # fmt: skip
    kept = [max(1, min(int(round(count * ratio)), side - start)) for count, ratio, side, start in
            zip((box.width, box.height), ratios, (width, height), (x, y), strict=True)]  # fmt: skip
    return Box(x, y, *kept)


def drawn_masks(segmentations: list[Any], height: int, width: int) -> Mask:
    """Draw masks, bool [n, H, W].

    Raises:
        SampleError: "objects" for one that is none.
    """
    try:
        found = [mask_of(one, height, width) for one in segmentations]
    except ValueError as error:
        raise SampleError(OBJECTS, str(error)) from error
    return np.stack(found) if found else np.zeros((0, height, width), bool)


def packed_masks(masks: Mask) -> npt.NDArray[np.uint8]:
    """Pack masks [n, H, W] eight pixels to a byte, uint8 [n, H, ceil(W / 8)]; the first pixel is the highest bit."""
    return np.packbits(masks, axis=2)


def unpacked_masks(masks: npt.NDArray[np.uint8], width: int) -> Mask:
    """Undo `packed_masks`."""
    return np.unpackbits(masks, axis=2, count=width).astype(bool)
