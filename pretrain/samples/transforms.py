"""Crops and resizing of whole clips in uint8, the same for every frame of a clip.

Clips are uint8 [T, H, W, 3].
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from pretrain.data.decoders.crops import Box, cut

Clip = npt.NDArray[np.uint8]
#: Ways to make frames smaller and to cut them where a video is judged: those of VideoMAE, or of TSN and its heirs.
Geometry = Literal["videomae", "tsn"]

#: MultiScaleCrop's sizes relative to the short side.
SCALES = (1.0, 0.875, 0.75, 0.66)


def crop_sizes(width: int, height: int, out_width: int, out_height: int) -> list[tuple[int, int]]:
    """List (width, height) pairs that MultiScaleCrop chooses from, in the official order: scales at most a step apart.

    Sizes within 2 pixels of the output snap to it (GroupMultiScaleCrop in the official transforms.py).
    """
    sizes = [int(min(width, height) * scale) for scale in SCALES]
    widths = [out_width if abs(size - out_width) < 3 else size for size in sizes]
    heights = [out_height if abs(size - out_height) < 3 else size for size in sizes]
    return [(w, h) for i, h in enumerate(heights) for j, w in enumerate(widths) if abs(i - j) <= 1]


def crop_offsets(width: int, height: int, crop_width: int, crop_height: int) -> list[tuple[int, int]]:
    """List MultiScaleCrop's 13 (x, y) offsets in the official order: corners, centre, edge middles, quarter points."""
    dx, dy = (width - crop_width) // 4, (height - crop_height) // 4
    corners_and_centre = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
    edges = [(0, 2), (4, 2), (2, 4), (2, 0)]
    quarters = [(1, 1), (3, 1), (1, 3), (3, 3)]
    return [(i * dx, j * dy) for i, j in corners_and_centre + edges + quarters]


def multiscale_box(width: int, height: int, out_width: int, out_height: int, rng: np.random.Generator) -> Box:
    """Draw one crop of MultiScaleCrop.

    A size that snapped to an output just larger than the video would leave it; it is cut to the video, where the
    official code fills up to 2 pixels with black.
    """
    sizes = crop_sizes(width, height, out_width, out_height)
    crop_width, crop_height = sizes[rng.integers(len(sizes))]
    crop_width, crop_height = min(crop_width, width), min(crop_height, height)
    offsets = crop_offsets(width, height, crop_width, crop_height)
    x, y = offsets[rng.integers(len(offsets))]
    return Box(x, y, crop_width, crop_height)


def crop_resize(clip: Clip, box: Box, out_width: int, out_height: int) -> Clip:
    """Cut `box` out of every frame and resize it, bilinear with antialiasing: PIL's result within one grey level."""
    return resize(cut(clip, box), out_width, out_height)


def resize(clip: Clip, out_width: int, out_height: int, antialias: bool = True) -> Clip:
    """Resize every frame, bilinear; without antialiasing as OpenCV does."""
    if clip.shape[1:3] == (out_height, out_width):
        return np.ascontiguousarray(clip)
    # Channels-last frames in uint8 take torch's vectorised path, which follows Pillow's.
    frames = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2)
    small = functional.interpolate(
        frames, size=(out_height, out_width), mode="bilinear", antialias=antialias, align_corners=False
    )
    return np.ascontiguousarray(small.permute(0, 2, 3, 1).numpy())


def resize_short(clip: Clip, short: int, antialias: bool = True) -> Clip:
    """Resize so that the short side has `short` pixels; the long side keeps the aspect, rounded down."""
    height, width = clip.shape[1:3]
    if height <= width:
        return resize(clip, int(width * short / height), short, antialias)
    return resize(clip, short, int(height * short / width), antialias)


def centred(margin: int) -> int:
    """Halve a margin as the official centre crops do, halves to even: 1 -> 0, 3 -> 2, 5 -> 2, 7 -> 4."""
    return round(margin / 2)


def centre_crop(clip: Clip, out_width: int, out_height: int) -> Clip:
    """Resize so that the output is just covered, then cut its centre."""
    height, width = clip.shape[1:3]
    scale = max(out_width / width, out_height / height)
    # round() with the covering side given exactly: a float error must not make the result one pixel too small.
    new_width, new_height = max(out_width, round(width * scale)), max(out_height, round(height * scale))
    scaled = resize(clip, new_width, new_height)
    x, y = centred(new_width - out_width), centred(new_height - out_height)
    return np.ascontiguousarray(scaled[:, y : y + out_height, x : x + out_width])


def spatial_starts(width: int, height: int, short: int, crops: int) -> tuple[str, list[int]]:
    """Place test crops along a video's long side, its short one being `short`: ("columns" or "rows", starts in pixels).

    One crop is centred (the official code divides by zero there).
    """
    axis, free = ("columns", width - short) if width > height else ("rows", height - short)
    if crops == 1:
        return axis, [free // 2]
    return axis, [int(crop * (free / (crops - 1))) for crop in range(crops)]


def spatial_views(clip: Clip, short: int, crops: int) -> list[Clip]:
    """Cut square test crops, short x short, of a clip whose short side is `short` already."""
    axis, starts = spatial_starts(clip.shape[2], clip.shape[1], short, crops)
    if axis == "columns":
        return [clip[:, :, start : start + short] for start in starts]
    return [clip[:, start : start + short] for start in starts]


def quarter_views(clip: Clip, side: int) -> list[Clip]:
    """Cut TSN's three test crops side x side: left, right and centre, in steps of a quarter of the free width.

    All lie in the middle of the height, so that those of an upright video, whose width is `side`, are one and the same.
    """
    across, down = (clip.shape[2] - side) // 4, (clip.shape[1] - side) // 4
    rows = slice(2 * down, 2 * down + side)
    return [clip[:, rows, step * across : step * across + side] for step in (0, 4, 2)]
