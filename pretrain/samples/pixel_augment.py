"""Section of a recipe for augmentations of pixels; apart from them, since recipes are read without loading torch."""

from dataclasses import dataclass


@dataclass
class PixelAugment:
    """Augmentations of the pixels of training clips: all uint8, all draws the sample's own."""

    randaugment: str | None = "rand-m7-n4-mstd0.5-inc1"
    """timm's RandAugment in its own notation, the same parameters for all frames of a clip; null: none"""
    area: tuple[float, float] = (0.08, 1.0)
    """share of the frame that the random resized crop takes"""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """width / height of the random resized crop, drawn log-uniformly"""
    erasing: float = 0.25
    """probability that one box of a clip is filled with noise"""
