"""Augmentation of one view in contrastive learning: crop, colours, blur, solarise, mirror; the same for all its frames.

Operations, their order and Pillow's filters are MoCo-v3's (two views with probabilities of their own, as in BYOL);
systems/snclr.md, section 4. All in uint8, all draws the sample's own.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from pretrain.data.decoders.crops import Box
from pretrain.data.samples import Draw
from pretrain.runtime.vision_ops import ensure_torchvision
from pretrain.samples.augment import resized_crop_box
from pretrain.samples.picture_transforms import FILTERS
from pretrain.samples.transforms import Clip

#: Values from here on are inverted by solarising.
SOLARISE_FROM = 128


@dataclass
class ViewAugment:
    """What is done to one view, and how often."""

    area: tuple[float, float] = (0.08, 1.0)
    """share of the frame that the random resized crop takes"""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """width / height of the random resized crop, drawn log-uniformly"""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """largest change of brightness, contrast, saturation (shares) and hue (of the colour circle, at most 0.5)"""
    jitter_share: float = 0.8
    """probability that colours are changed"""
    grey: float = 0.2
    """probability of grey"""
    blur: float = 1.0
    """probability of a Gaussian blur"""
    blur_radius: tuple[float, float] = (0.1, 2.0)
    """standard deviation of the blur, pixels, drawn uniformly"""
    solarise: float = 0.0
    """probability that values from 128 on are inverted"""
    flip: float = 0.5
    """probability that the view is mirrored"""


def view_problems(section: str, options: ViewAugment) -> list[str]:
    """Say what in a section of a recipe can't work."""
    found = []
    for name in ("jitter_share", "grey", "blur", "solarise", "flip"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            found.append(f"{section}.{name}: found {value}, allowed: 0 to 1, a probability")
    if not 0 < options.area[0] <= options.area[1] <= 1:
        found.append(f"{section}.area: found {list(options.area)}, allowed: two shares above 0, at most 1, in order")
    if not 0 < options.aspect[0] <= options.aspect[1] < math.inf:
        found.append(f"{section}.aspect: found {list(options.aspect)}, allowed: two ratios above 0, in order")
    if not 0 <= options.blur_radius[0] <= options.blur_radius[1] < math.inf:
        found.append(f"{section}.blur_radius: found {list(options.blur_radius)}, allowed: two numbers from 0, in order")
    # `not <=` and not `>`: NaN is neither.
    if not all(0 <= value < math.inf for value in options.jitter) or not options.jitter[3] <= 0.5:
        found.append(f"{section}.jitter: found {list(options.jitter)}, allowed: 0 or more, the last at most 0.5")
    return found


def view_box(width: int, height: int, options: ViewAugment, draw: Draw) -> Box:
    """Draw the crop of a view."""
    return resized_crop_box(width, height, options.area, options.aspect, draw("crop"))


def augmented_view(crop: Clip, size: tuple[int, int], options: ViewAugment, draw: Draw) -> Clip:
    """Make a view of its crop.

    Args:
        crop: what `view_box` holds, uint8 [T, h, w, 3].
        size: (width, height) of the view.
        options: the view's section.
        draw: purpose -> generator of this sample and view.

    Returns:
        uint8 [T, height, width, 3].
    """
    steps = _steps(options, draw)
    # Cut before it is resized: Pillow's argument `box` would let pixels from outside shine in.
    frames = [Image.fromarray(np.ascontiguousarray(frame)).resize(size, FILTERS["bilinear"]) for frame in crop]
    for step in steps:
        frames = [step(frame) for frame in frames]
    return np.stack([np.asarray(frame) for frame in frames])


def _steps(options: ViewAugment, draw: Draw) -> list[Callable[[Image.Image], Image.Image]]:
    """List what is done to each frame, in MoCo-v3's order; drawn once, so that all frames get the same."""
    steps: list[Callable[[Image.Image], Image.Image]] = []
    if (rng := draw("jitter")).random() < options.jitter_share:
        steps += _jitter(options.jitter, rng)
    if draw("grey").random() < options.grey:
        steps.append(lambda frame: frame.convert("L").convert("RGB"))
    if (rng := draw("blur")).random() < options.blur:
        blur = ImageFilter.GaussianBlur(float(rng.uniform(*options.blur_radius)))
        steps.append(lambda frame: frame.filter(blur))
    if draw("solarise").random() < options.solarise:
        steps.append(functools.partial(ImageOps.solarize, threshold=SOLARISE_FROM))
    if draw("flip").random() < options.flip:
        steps.append(ImageOps.mirror)
    return steps


def _jitter(strengths: tuple[float, ...], rng: np.random.Generator) -> list[Callable[[Image.Image], Image.Image]]:
    """Draw factors and their order, as torchvision's ColorJitter."""
    low = [max(0.0, 1 - strength) for strength in strengths[:3]] + [-strengths[3]]
    high = [1 + strength for strength in strengths[:3]] + [strengths[3]]
    factors = rng.uniform(low, high)
    # One that changes nothing is left out: by way of hue and back colours would lose a level.
    changes = [number for number in rng.permutation(len(strengths)) if strengths[number]]
    return [functools.partial(_adjusters()[number], factor=float(factors[number])) for number in changes]


@functools.cache
def _adjusters() -> list[Callable[..., Image.Image]]:
    """Give torchvision's functions for brightness, contrast, saturation and hue of Pillow's images."""
    ensure_torchvision()
    from torchvision.transforms import functional

    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    functions: list[Any] = [getattr(functional, name) for name in names]
    return [lambda frame, factor, change=change: change(frame, factor) for change in functions]
