"""Settings of token reorganisation, and the arithmetic that follows from them.

Recipes are checked, FLOPs counted and schedules followed with it, without a model; token_reorganisation.py does it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.errors import RecipeError


@dataclass
class Reorganisation:
    """Token reorganisation: which tokens go, and where."""

    keep_rate: float = 1.0
    """share of tokens that each dropping block keeps; 1: token reorganisation is off"""
    score: Literal["auto", "keyframe", "added_class"] = "auto"
    """auto: attention of the class token, or received from all tokens where there is none; keyframe: received, and the
    middle time slice always stays (EVAD); added_class: of a class token that video models get new and learn"""
    keyframe_weight: float = 1.0
    """with score keyframe: how much the attention of the middle slice's queries counts (EVAD: 1 at 0.7, 4 at 0.6)"""
    blocks: list[int] | None = None
    """dropping blocks, counted from 0; null: a quarter, a half and three quarters of the depth"""
    fuse: bool = True
    """replace the dropped tokens of a block by their sum, weighted with their scores; false: drop them"""
    fuse_norm: bool = False
    """divide the fused token by the sum of its weights (not EViT)"""
    per_frame: bool = False
    """keep the same number of tokens of every time slice, so that no moment disappears"""
    size_weighted: bool = False
    """mean pooling counts a fused token as often as it stands for original ones"""
    start_epoch: float = 0
    """training: epochs before the keep rate begins to fall from 1; from scratch 10 of 300"""
    shrink_epochs: float = 0
    """training: epochs that it takes to fall to keep_rate, along a cosine; 0: at once; from scratch 100 of 300"""


def default_blocks(depth: int) -> list[int]:
    """Give the default blocks, a quarter, a half and three quarters of the depth: (3, 6, 9) of 12 as published."""
    # A set: in models of few blocks two of the three coincide.
    return sorted({depth // 4, depth // 2, 3 * depth // 4})


def keep_rates(config: Reorganisation, depth: int) -> list[float]:
    """Give the rate of every block, 1 where nothing is dropped.

    Raises:
        RecipeError: a rate outside (0, 1] or a block that the model lacks.
    """
    problems = rate_problems(config, depth)
    if problems:
        raise RecipeError(problems)
    chosen = default_blocks(depth) if config.blocks is None else config.blocks
    return [config.keep_rate if index in chosen else 1.0 for index in range(depth)]


def rate_problems(config: Reorganisation, depth: int) -> list[str]:
    """List what keeps a model of this depth from dropping tokens so."""
    problems = [
        f"blocks={config.blocks}: this model has blocks 0 to {depth - 1}, not {block}"
        for block in config.blocks or []
        if not 0 <= block < depth
    ]
    if not 0 < config.keep_rate <= 1:
        problems.append(f"keep_rate={config.keep_rate}: above 0 and at most 1 is needed")
    if config.score == "keyframe" and config.per_frame:
        problems.append("score=keyframe: the middle slice keeps all its tokens; it excludes per_frame=true")
    if config.keyframe_weight <= 0:
        problems.append(f"keyframe_weight={config.keyframe_weight}: above 0 is needed")
    if config.size_weighted and not config.fuse:
        problems.append("size_weighted=true: without fuse=true every token stands for itself")
    return problems


def tokens_kept(tokens: int, rate: float) -> int:
    """Compute ceil(rate * tokens) in double precision, as officially: 0.55 of 100 are 56."""
    return math.ceil(rate * tokens)


def token_counts(tokens: int, rates: Sequence[float], fuse: bool, slices: int = 1) -> list[int]:
    """Count tokens behind each block, fused ones too, class tokens not; `slices` is T' where stratified, else 1."""
    counts, fused = [], 0
    for rate in rates:
        # A fused token belongs to no slice; counted in, the slices would not come out even.
        ranked = tokens - (fused if slices > 1 else 0)
        kept = tokens_kept(ranked // slices, rate) * slices if rate < 1 else ranked
        if kept < ranked:
            fused = int(fuse)
            tokens = kept + fused
        counts.append(tokens)
    return counts


def scheduled_rate(base: float, step: int, steps_per_epoch: int, start_epoch: float, shrink_epochs: float) -> float:
    """Compute the keep rate of optimiser step `step` when training from scratch: 1, then a cosine down to `base`.

    Source: official `adjust_keep_rate`; shrinking lasts from `start_epoch` for `shrink_epochs`, 0 being a jump.
    """
    start, length = start_epoch * steps_per_epoch, shrink_epochs * steps_per_epoch
    # Ends are compared by whole epochs, the cosine runs by steps: both as officially.
    epoch = step // steps_per_epoch
    if epoch < start_epoch:
        return 1.0
    if epoch >= start_epoch + shrink_epochs:
        return base
    return base + (1 - base) * 0.5 * (1 + math.cos(math.pi * (step - start) / length))
