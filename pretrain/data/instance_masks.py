"""Masks of single objects as COCO writes them: polygons and run lengths, to pixels and back.

Pixels of a polygon are those of COCO's own code (`rleFrPoly` in pycocotools' maskApi.c): its border is drawn five times
as fine, and a column of pixels changes sides where the border crosses its middle. Run lengths go down the columns, and
begin with a run of pixels that are not the object's, which may be of none.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

#: Points of a drawn border for each pixel, along each axis.
FINENESS = 5
#: Numbers of the smallest polygon: x and y of three corners.
TRIANGLE = 6
#: Pixels from a picture beyond which corners are moved nearer: a border of any length would be drawn point by point.
FARTHEST = 1e5
#: Longest number of a packed run length that is read, in groups of five bits.
MOST_GROUPS = 13


def mask_of(segmentation: Any, height: int, width: int) -> Mask:
    """Draw an object's mask, bool [H, W].

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...], whose union is meant, or a dictionary of run lengths:
            `size` [H, W] and `counts`, a list of numbers or COCO's packed text.
        height: of the picture, pixels; what reaches over its border is cut off.
        width: of the picture.

    Raises:
        ValueError: it is neither, or of another picture's size.
    """
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if not isinstance(size, list) or size != [height, width]:
            raise ValueError(f"run lengths of a mask of {size}, the picture has [{height}, {width}] (height, width)")
        counts = segmentation.get("counts")
        return mask_of_runs(unpacked_runs(counts) if isinstance(counts, str) else counts, height, width)
    if not isinstance(segmentation, list):
        raise ValueError(f"{str(segmentation)[:60]!r} is neither a list of polygons nor a dictionary of run lengths")
    drawn = np.zeros((height, width), bool)
    for polygon in segmentation:
        drawn |= mask_of_polygon(polygon, height, width)
    return drawn


def mask_of_polygon(polygon: Sequence[float], height: int, width: int) -> Mask:
    """Draw the inside of one closed polygon, bool [H, W].

    Raises:
        ValueError: fewer than three corners, an odd number of numbers, or something else than finite numbers.
    """
    # Towards zero, as C makes a number whole, and no farther out than what could ever be seen.
    corners = np.clip(corners_of(polygon), -FARTHEST, FARTHEST)
    fine = np.trunc(corners * FINENESS + 0.5).astype(np.int64)
    x, y = _border(fine)
    changed = np.flatnonzero(x[1:] != x[:-1])
    column = (np.minimum(x[changed], x[changed + 1]) + 0.5) / FINENESS - 0.5
    row = (np.minimum(y[changed], y[changed + 1]) + 0.5) / FINENESS - 0.5
    middle = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    rows = np.ceil(np.clip(row[middle], 0, height)).astype(np.int64)
    # Every crossing turns all pixels behind it over, down its column and through all later ones, whose crossings come
    # in pairs; so a running sum's parity is the mask.
    turns = np.bincount(column[middle].astype(np.int64) * height + rows, minlength=height * width + 1)
    return _by_rows(np.cumsum(turns[: height * width]) % 2 == 1, height, width)


def corners_of(polygon: Sequence[float]) -> npt.NDArray[np.float64]:
    """Read the corners of a polygon, x and y [k, 2].

    Raises:
        ValueError: fewer than three, an odd number of numbers, or something else than finite numbers.
    """
    try:
        numbers = np.asarray(polygon, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"a polygon of something else than numbers: {str(polygon)[:60]}") from error
    if numbers.ndim != 1 or len(numbers) < TRIANGLE or len(numbers) % 2 or not np.isfinite(numbers).all():
        raise ValueError(f"a polygon of {numbers.size} numbers, allowed: x and y of three corners or more, finite")
    return numbers.reshape(-1, 2)


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Raise ValueError where `mask_of` would, without drawing polygons."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            corners_of(polygon)
    else:
        mask_of(segmentation, height, width)


def _border(corners: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """List the points of a closed line through corners [k, 2], a step along the longer axis at a time."""
    start, end = corners, np.roll(corners, -1, axis=0)
    spans = np.abs(end - start)
    steep = spans[:, 1] > spans[:, 0]
    longer = np.where(steep, 1, 0)
    each = np.arange(len(corners))
    # Edges are drawn from their smaller end, so that both directions round alike.
    flipped = start[each, longer] > end[each, longer]
    low, high = (np.where(flipped[:, None], one, other) for one, other in ((end, start), (start, end)))
    lengths = spans.max(1)
    edge = np.repeat(each, lengths + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(lengths + 1) - (lengths + 1), lengths + 1)
    step = np.where(flipped[edge], lengths[edge] - step, step)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (high - low)[each, 1 - longer] / lengths
    slope = np.where(lengths > 0, slope, 0.0)
    along = low[edge, longer[edge]] + step
    aside = np.trunc(low[edge, 1 - longer[edge]] + slope[edge] * step + 0.5).astype(np.int64)
    upright = steep[edge]
    return np.where(upright, aside, along), np.where(upright, along, aside)


def mask_of_runs(counts: Any, height: int, width: int) -> Mask:
    """Draw run lengths, bool [H, W].

    Raises:
        ValueError: no list of whole numbers from 0 on, or not as many pixels as the picture has.
    """
    if not isinstance(counts, list) or any(type(one) is not int or one < 0 for one in counts):
        raise ValueError(f"run lengths {str(counts)[:60]}, allowed: a list of whole numbers from 0 on, or packed text")
    if (total := sum(counts)) != height * width:
        raise ValueError(f"run lengths of {total} pixels, the picture has {height * width}")
    inside = np.arange(len(counts)) % 2 == 1
    return _by_rows(np.repeat(inside, counts), height, width)


def runs_of(mask: Mask) -> list[int]:
    """Give the run lengths of a mask [H, W]."""
    flat = np.ascontiguousarray(mask.T).reshape(-1)
    ends = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [len(flat)]))
    runs: list[int] = np.diff(ends).tolist()
    return [0, *runs] if len(flat) and flat[0] else runs


def packed_runs(counts: Iterable[int]) -> str:
    """Write run lengths as COCO's text: differences to the last but one, five bits a letter, lowest first."""
    counts, letters = list(counts), []
    for number, count in enumerate(counts):
        left = count - counts[number - 2] if number > 2 else count
        while True:
            group, left = left & 0x1F, left >> 5
            # The highest bit of the last group is the sign of what would follow.
            more = left != (-1 if group & 0x10 else 0)
            letters.append(chr(48 + (group | (0x20 if more else 0))))
            if not more:
                break
    return "".join(letters)


def unpacked_runs(text: str) -> list[int]:
    """Read COCO's text of run lengths.

    Raises:
        ValueError: a letter that there is not, or a number without an end.
    """
    counts: list[int] = []
    value = groups = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or groups >= MOST_GROUPS:
            raise ValueError(f"packed run lengths with {letter!r} where there is no such letter")
        value |= (code & 0x1F) << 5 * groups
        groups += 1
        if code & 0x20:
            continue
        if code & 0x10:
            value |= -1 << 5 * groups
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = groups = 0
    if groups:
        raise ValueError("packed run lengths that end within a number")
    return counts


def _by_rows(flat: npt.NDArray[np.bool_], height: int, width: int) -> Mask:
    return np.ascontiguousarray(flat.reshape(width, height).T)
