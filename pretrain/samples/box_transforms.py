"""Geometry of clips with boxes, and colour that leaves boxes alone: pure functions of arrays and what was drawn.

Boxes are float32 [N, 4], x1 y1 x2 y2. Two conventions are in use (systems/action_detection.md section 2.6), and a name
says which one a function follows: `inclusive`, where x2 is the last pixel column inside and a width is x2 - x1 + 1
(AlphAction, VideoMAE's detector, CycleACR), and `continuous`, where it is the right edge and a width is x2 - x1.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.crops import Box
from pretrain.samples.transforms import Clip

BoxArray = npt.NDArray[np.float32]

#: Farthest that a side moves, shares of the box's width and height: outwards, inwards (AlphAction; section 3.2).
JITTER_OUT, JITTER_IN = (0.2, 0.1), (0.1, 0.05)
#: Largest shifts of hue (0..179), saturation and value (0..255), in OpenCV's units for 8 bits (section 3.1).
HSV_SHIFTS = (10, 26, 26)


@dataclass(frozen=True)
class Convention:
    """How a system counts pixels.

    Attributes:
        inclusive: loaded boxes end in their last pixel, and answers give it back: x2 - 1 and x2 + 1.
        last_pixel: coordinates end at W - 1 and are mirrored to W - x2 - 1 .. W - x1 - 1; else at W, W - x2 .. W - x1.
        mirror_first: clips are mirrored before they are resized.
        nearest: sizes are rounded to the nearest pixel, else down.
    """

    inclusive: bool
    last_pixel: bool
    mirror_first: bool
    nearest: bool


ConventionName = Literal["alphaction", "slowfast", "continuous"]
#: By the name in a recipe. SlowFast (and EVAD) has right edges, which it nevertheless mirrors as last pixels.
CONVENTIONS: dict[str, Convention] = {
    "alphaction": Convention(inclusive=True, last_pixel=True, mirror_first=False, nearest=False),
    "slowfast": Convention(inclusive=False, last_pixel=True, mirror_first=True, nearest=True),
    "continuous": Convention(inclusive=False, last_pixel=False, mirror_first=False, nearest=True),
}


def resized_size(
    width: int, height: int, short_side: int, long_side: int | None = None, nearest: bool = False
) -> tuple[int, int]:
    """Compute width and height of a frame whose short side becomes `short_side`, or less where the long side would
    exceed `long_side`.

    Args:
        width: pixels.
        height: pixels.
        short_side: pixels.
        long_side: most pixels; None: no limit.
        nearest: round to the nearest (EVAD: int(x + 0.5)), else down (AlphAction: int(x)). AlphAction's function also
            swaps the two where the frame has the asked size already, which turns its target on the side: not copied.
    """
    short = float(short_side)
    if long_side is not None and max(width, height) / min(width, height) * short_side > long_side:
        short = long_side * min(width, height) / max(width, height)
        # AlphAction rounds the shortened side first and computes the long one from it.
        short = short if nearest else float(round(short))
    scale = short / min(width, height)
    around = 0.5 if nearest else 0.0
    # The short side is given exactly: its own quotient may come out a rounding below.
    sides = [int(short + around) if side == min(width, height) else int(side * scale + around + 1e-9)
             for side in (width, height)]  # fmt: skip
    return max(sides[0], 1), max(sides[1], 1)


def pixels_from_shares(shares: npt.ArrayLike, width: int, height: int, rules: Convention) -> BoxArray:
    """Turn boxes in shares of a frame's sides into pixels.

    Inclusive, x2 = x1 + max(w - 1, 0), as AlphAction loads them; SlowFast cuts its edges to the last pixel.
    """
    boxes = np.asarray(shares, np.float64).reshape(-1, 4) * (width, height, width, height)
    if rules.inclusive:
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:] - boxes[:, :2] - 1, 0)
    return clip_boxes(boxes.astype(np.float32), width, height, rules)


def shares_from_pixels(
    boxes: BoxArray, size: tuple[int, int], original: tuple[int, int], rules: Convention
) -> BoxArray:
    """Turn boxes in pixels of a resized frame into shares of its sides, cut to [0, 1]: what answers hold.

    Args:
        boxes: float32 [N, 4].
        size: width and height of the resized frame.
        original: those of the decoded one, where inclusive boxes are given their last pixel back (section 2.6).
        rules: of the boxes.
    """
    pixels = scale_boxes(boxes, size, original)
    if rules.inclusive:
        pixels[:, 2:] += 1
    return np.clip(pixels / np.array([*original, *original], np.float32), 0, 1).astype(np.float32)


def clip_boxes(boxes: BoxArray, width: int, height: int, rules: Convention) -> BoxArray:
    """Cut boxes to a frame, by its edges or its last pixels as the convention has it."""
    cut_off = clip_boxes_inclusive if rules.last_pixel else clip_boxes_continuous
    return cut_off(boxes, width, height)


def clip_boxes_inclusive(boxes: BoxArray, width: int, height: int) -> BoxArray:
    """Cut boxes to [0, W - 1] x [0, H - 1]."""
    return clip_boxes_continuous(boxes, width - 1, height - 1)


def clip_boxes_continuous(boxes: BoxArray, width: int, height: int) -> BoxArray:
    """Cut boxes to [0, W] x [0, H]."""
    return np.clip(boxes, np.float32(0), np.array([width, height, width, height], np.float32))


def scale_boxes(boxes: BoxArray, old: tuple[int, int], new: tuple[int, int]) -> BoxArray:
    """Follow a resize from `old` to `new`, both width and height; either convention."""
    ratios = (new[0] / old[0], new[1] / old[1])
    return (boxes * np.array([*ratios, *ratios], np.float32)).astype(np.float32)


def mirror_boxes(boxes: BoxArray, width: int, rules: Convention) -> BoxArray:
    """Mirror left and right: W - x2 - 1 .. W - x1 - 1 where coordinates count pixels, else W - x2 .. W - x1."""
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = width - boxes[:, [2, 0]] - (1 if rules.last_pixel else 0)
    return mirrored


def crop_boxes(boxes: BoxArray, crop: Box, rules: Convention) -> BoxArray:
    """Follow a crop, cut to it; a box outside ends up without area at its border, and stays."""
    moved = boxes - np.array([crop.x, crop.y, crop.x, crop.y], np.float32)
    return clip_boxes(moved, crop.width, crop.height, rules)


def jitter_boxes_inclusive(boxes: BoxArray, width: int, height: int, rng: np.random.Generator) -> BoxArray:
    """Move every side of every box by itself, farther outwards than inwards, and cut to the frame (section 3.2)."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    out, inwards = np.array(JITTER_OUT), np.array(JITTER_IN)
    first = boxes[:, :2] + sides * rng.uniform(-out, inwards, (len(boxes), 2))
    last = boxes[:, 2:] + sides * rng.uniform(-inwards, out, (len(boxes), 2))
    most = np.array([width, height])
    # A pixel at least: sides that have passed each other would be a box of negative size.
    first = np.clip(first, 0, np.maximum(most - 2, 0))
    last = np.maximum(np.minimum(last, most - 1), first + 1)
    return clip_boxes_inclusive(np.concatenate((first, last), axis=1).astype(np.float32), width, height)


def draw_hsv_shift(rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw whole shifts of hue, saturation and value, uniform in +-HSV_SHIFTS."""
    hue, saturation, value = (int(rng.integers(-most, most + 1)) for most in HSV_SHIFTS)
    return hue, saturation, value


def shift_hsv(clip: Clip, hue: int, saturation: int, value: int) -> Clip:
    """Shift the colours of a clip uint8 [T, H, W, 3]: hue turns around, saturation and value end at 0 and 255.

    Conversions are OpenCV's for 8 bits, with a hue of 0..179: equal to HSV, within one level back.
    """
    # Frame by frame: temporaries of a whole clip would leave every cache.
    return np.stack([_shifted(frame, hue, saturation, value) for frame in clip])


def _shifted(frame: npt.NDArray[np.uint8], hue: int, saturation: int, value: int) -> npt.NDArray[np.uint8]:
    h, s, v = hsv_from_rgb(frame)
    h = (h + hue) % 180
    return rgb_from_hsv(h, np.clip(s + saturation, 0, 255), np.clip(v + value, 0, 255))


@functools.cache
def _division_tables() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Give (255 << 12) / i and (180 << 12) / (6 i), rounded, 0 for 0: OpenCV divides by table."""
    numbers = np.maximum(np.arange(256), 1)
    tables = [np.rint(most * 4096 / numbers).astype(np.int32) for most in (255, 30)]
    for table in tables:
        table[0] = 0
    return tables[0], tables[1]


def hsv_from_rgb(frame: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int32], ...]:
    """Convert pixels uint8 [..., 3] to hue in 0..179, saturation and value in 0..255, int32 [...] each."""
    by_value, by_range = _division_tables()
    red, green, blue = (frame[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    turned = np.where(value == red, green - blue, np.where(value == green, blue - red + 2 * spread,
                      red - green + 4 * spread))  # fmt: skip
    hue = (turned * by_range[spread] + 2048) >> 12
    return hue + 180 * (hue < 0), (spread * by_value[value] + 2048) >> 12, value


def rgb_from_hsv(
    hue: npt.NDArray[np.int32], saturation: npt.NDArray[np.int32], value: npt.NDArray[np.int32]
) -> npt.NDArray[np.uint8]:
    """Convert hue in 0..179, saturation and value in 0..255 to pixels uint8 [..., 3]."""
    falls = _hue_tables()
    # What a channel lacks to the full value is saturation times how far the hue is from the channel's own.
    depth = (saturation * value).astype(np.float32) * np.float32(1 / 255)
    # OpenCV cuts fractions off; a full channel must not fall below its own value by a rounding.
    full = value.astype(np.float32) + np.float32(1e-3)
    return np.stack([(full - depth * fall[hue]).astype(np.uint8) for fall in falls], axis=-1)


@functools.cache
def _hue_tables() -> tuple[npt.NDArray[np.float32], ...]:
    """Give for red, green and blue how much of the saturation each hue 0..179 takes off, float32 [180]."""
    turns = [(start + np.arange(180) / 30) % 6 for start in (5, 3, 1)]
    red, green, blue = (np.clip(np.minimum(turn, 4 - turn), 0, 1).astype(np.float32) for turn in turns)
    return red, green, blue
