"""Colour jitter of a whole clip: brightness, contrast, saturation and hue, the same for all of its frames."""

import numpy as np
from PIL import Image, ImageEnhance

from pretrain.samples.transforms import Clip

#: Strengths of brightness, contrast, saturation (factors from 1 - s to 1 + s) and hue (shares of its circle).
Strengths = tuple[float, float, float, float]


def jittered_clip(clip: Clip, strengths: Strengths, rng: np.random.Generator) -> Clip:
    """Change a clip's colours by drawn amounts in a drawn order (torchvision's ColorJitter, Pillow's operations).

    Args:
        clip: uint8 [T, H, W, 3].
        strengths: 0 leaves a property as it is.
        rng: of the sample and view.
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = [rng.uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths[:3]]
    turn = rng.uniform(-strengths[3], strengths[3])
    frames = [Image.fromarray(frame) for frame in clip]
    for number in rng.permutation(4).tolist():
        if strengths[number] == 0:
            continue
        if number == 3:
            frames = [_hue_turned(frame, turn) for frame in frames]
        else:
            frames = [enhancers[number](frame).enhance(factors[number]) for frame in frames]
    return np.stack([np.asarray(frame) for frame in frames])


def _hue_turned(frame: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = frame.convert("HSV").split()
    steps = round(turn * 255) % 256
    turned = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
