"""Frames of a clip by a video's motion: each carries the same share of it (MGSampler, arXiv 2104.09952).

A motion curve d [M - 1] says how much frame i + 1 differs from frame i of a video of M frames (motion_curves.py makes
it). Its cumulative distribution S is cut into equal shares, and a share's frame is the first of the pair at which S is
nearest to it. Source: the sampler of MCG-NJU/MGSampler @ 758bcd9, whose 16 frames are any number here, and whose frame
number 1 is frame 0.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.samples.sampling import Indices

Rule = Literal["nearest", "inverse"]
#: Measures of motion between two frames; see motion_curves.py.
Kind = Literal["ssim", "abs", "feature"]
Shares = npt.NDArray[np.float64]

#: A curve and a video that differ by no more than this share of the video's frames, or by one frame, are of the same
#: video, seen by two decoders: one drops a frame at the end, say.
LENGTH_TOLERANCE = 0.05


@dataclass
class MotionOptions:
    """Choice of frames by motion, for sources with `sampling: motion`."""

    kind: Kind = "ssim"
    """measure that the curves beside the shards must have been made by; ssim: 1 - structural similarity (as released),
    abs: absolute difference (as the paper says), feature: difference of one convolution's output"""
    mu: float = 0.5
    """exponent on the curve before it is summed, from 0 (uniform in time) to 1 (in proportion to motion)"""
    rule: Rule = "nearest"
    """nearest: the position whose share of motion is nearest to the wanted one (as released); inverse: the first one
    that reaches it"""
    pairs: bool = False
    """choose half as many positions and take both frames of each, so that a tubelet of two frames shows their motion
    (VideoMAE)"""
    strict: bool = False
    """a video without a usable curve is a bad sample; else its frames are chosen uniformly in time, and such videos are
    counted at the start"""

    def problems(self, key: str) -> list[str]:
        """Say what in this section can't work; `key` is where it stands."""
        if 0 <= self.mu <= 1:
            return []
        return [f"{key}.mu: found {self.mu:g}, allowed: from 0 (uniform in time) to 1 (in proportion to motion)"]


def training_targets(count: int, rng: np.random.Generator) -> Shares:
    """Draw one share uniformly from each of `count` equal parts of [0, 1): float64 [count], ascending."""
    return (np.arange(count) + rng.random(count)) / count


def test_targets(count: int, clips: int = 1) -> Shares:
    """List the shares of the clips of a test, float64 [clips, count]: the middles of equal parts for one clip.

    More clips lie evenly between them: (k + (c + 0.5) / clips) / count (an extension: officially there is one clip).
    """
    return (np.arange(count) + (np.arange(clips)[:, None] + 0.5) / clips) / count


def usable(curve: npt.NDArray[np.floating]) -> bool:
    """Tell whether a curve can be read: one value or more, all of them numbers."""
    return bool(curve.size and np.isfinite(curve).all())


def distribution(curve: npt.ArrayLike, mu: float = 0.5) -> Shares | None:
    """Sum a motion curve up to shares of all motion.

    Args:
        curve: d [M - 1], usable; values below 0, which are roundings of 1 - SSIM, count as 0.
        mu: exponent, from 0 to 1.

    Returns:
        S, float64 [M - 1], which ends with 1 up to rounding; None for a video in which nothing moves.
    """
    # The power first: that of a sum would keep the spikes that an exponent below 1 is there to flatten.
    powers = np.maximum(np.asarray(curve, dtype=np.float64), 0.0) ** mu
    total = powers.sum()
    # In sequence, as cumsum sums: pairwise sums would move ties between two positions.
    return np.cumsum(powers / total) if total > 0 else None


def positions(shares: Shares, targets: Shares, rule: Rule = "nearest") -> Indices:
    """Find the positions of a distribution, int64 of the targets' shape.

    Args:
        shares: S, from `distribution`.
        targets: wanted shares, in [0, 1).
        rule: nearest: the least |S - target|, the first one of several; inverse: the first S that is not below it.
    """
    if rule == "inverse":
        # The last share may be rounded to less than 1, and a target above it would have no position.
        return np.minimum(np.searchsorted(shares, targets, side="left"), len(shares) - 1).astype(np.int64)
    # As released, and not by search: where rounding makes two distances equal, the first position is taken.
    return np.abs(shares - np.asarray(targets)[..., None]).argmin(axis=-1).astype(np.int64)


def fitted(curve_length: int, num_frames: int) -> bool:
    """Tell whether a curve of so many values is one of a video of so many frames, up to `LENGTH_TOLERANCE`."""
    return abs(curve_length + 1 - num_frames) <= max(1, LENGTH_TOLERANCE * num_frames)


def rescaled(found: Indices, curve_length: int, num_frames: int) -> Indices:
    """Move positions on a curve to those of a video that has another number of frames than the curve was made of."""
    pairs = max(num_frames - 1, 1)
    if curve_length == pairs:
        return found
    return np.minimum((found + 0.5) * pairs / curve_length, pairs - 1).astype(np.int64)


def uniform_frames(num_frames: int, targets: Shares) -> Indices:
    """Choose frames by shares of time: the one in which each target falls."""
    return np.minimum(targets * num_frames, num_frames - 1).astype(np.int64)
