"""Learning rates as a run of the recipe's batch size has them, and the curve that they follow."""

import math
from dataclasses import dataclass

from pretrain.recipe.schema import Optim, Recipe


@dataclass(frozen=True)
class Rates:
    """Actual learning rates: at the peak, at the end of the decay, and where the warm-up begins."""

    peak: float
    floor: float
    warmup_start: float


def actual_rates(recipe: Recipe) -> Rates:
    """Compute the rates for the recipe's batch: base x batch.samples / optim.base_batch, where `optim.scaled` says so.

    input.views does not count (VideoMAEv2, run_mae_pretraining.py: total_batch_size leaves num_sample out).
    """
    optim, scale = recipe.optim, recipe.batch.samples / recipe.optim.base_batch
    peak, others = (scale if rate_scales(optim, key) else 1.0 for key in ("base_lr", "base_min_lr"))
    return Rates(optim.base_lr * peak, optim.base_min_lr * others, optim.base_warmup_lr * others)


def rate_scales(optim: Optim, key: str) -> bool:
    """Tell whether the rate that `key` names grows with the batch."""
    return optim.scaled == "all" or (optim.scaled == "peak" and key == "base_lr")


def half_cosine(start: float, end: float, progress: float) -> float:
    """Follow half a cosine from `start` at progress 0 to `end` at 1; also SNCLR's and MoCo v3's teacher momentum."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))
