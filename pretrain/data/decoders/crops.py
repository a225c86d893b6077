"""Boxes to cut out of pictures: (x, y, width, height) in pixels, the corner counted from the upper left."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Box(NamedTuple):
    """A crop: its corner and size, in pixels."""

    x: int
    y: int
    width: int
    height: int


#: What to cut out of the frames of a video: (width, height) of its upright frames -> boxes inside them.
Boxes = Callable[[int, int], Sequence[Box]]


def whole(width: int, height: int) -> list[Box]:
    """Return one box around the whole picture."""
    return [Box(0, 0, width, height)]


def hull(boxes: Sequence[Box]) -> Box:
    """Compute the smallest box around some boxes."""
    x, y = min(box.x for box in boxes), min(box.y for box in boxes)
    right = max(box.x + box.width for box in boxes)
    bottom = max(box.y + box.height for box in boxes)
    return Box(x, y, right - x, bottom - y)


def cut(pictures: npt.NDArray[np.uint8], box: Box) -> npt.NDArray[np.uint8]:
    """Cut a box out of pictures [..., H, W, 3]; a view of their memory."""
    return pictures[..., box.y : box.y + box.height, box.x : box.x + box.width, :]
