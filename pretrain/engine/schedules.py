"""How many steps, and the learning rate of each: pure functions of the recipe and the step, so nothing has to be saved.

timm's CosineLRScheduler is not used: its warm-up is `lr * t / W`, which never reaches the peak at t = W - 1, while the
official one is linspace(0, lr, W) with both ends included (VideoMAE and VideoMAEv2, utils.cosine_scheduler).
"""

import math
from dataclasses import dataclass

from pretrain.errors import RecipeError
from pretrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run.

    Attributes:
        steps_per_epoch: optimiser steps in one pass over the data.
        total: optimiser steps of the whole schedule.
        last: steps after which this run ends, `total` or `schedule.max_steps`.
        warmup: steps of linear warm-up, from 0 to `peak` with both ends included.
        peak: largest learning rate.
        floor: the cosine's end, which is approached but never quite reached.
    """

    steps_per_epoch: int
    total: int
    last: int
    warmup: int
    peak: float
    floor: float

    def lr(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * step / max(1, self.warmup - 1)
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return self.floor + 0.5 * (self.peak - self.floor) * (1 + math.cos(math.pi * min(progress, 1.0)))

    def epoch(self, steps_done: int) -> float:
        """Passes over the data after `steps_done` steps."""
        return steps_done / self.steps_per_epoch


def build_schedule(recipe: Recipe, steps_per_epoch: int) -> Schedule:
    """The schedule of a recipe whose data gives `steps_per_epoch` steps a pass.

    Both rates scale with the batch: rate = base rate x batch.samples / optim.base_batch. input.views does not count
    (VideoMAEv2, run_mae_pretraining.py: total_batch_size leaves num_sample out).

    Raises:
        RecipeError: no step in an epoch, or a warm-up as long as the whole run.
    """
    if steps_per_epoch < 1:
        raise RecipeError(
            f"batch.samples: one step takes {recipe.batch.samples} videos, more than an epoch has; "
            "lower batch.samples or set data.epoch_samples"
        )
    total = max(1, round(recipe.schedule.epochs * steps_per_epoch))
    warmup = int(recipe.schedule.warmup_epochs * steps_per_epoch)
    if warmup > 0 and warmup >= total:
        raise RecipeError(
            f"schedule.warmup_epochs: {recipe.schedule.warmup_epochs} epochs of warm-up are not shorter than "
            f"schedule.epochs: {recipe.schedule.epochs}"
        )
    scale = recipe.batch.samples / recipe.optim.base_batch
    last = total if recipe.schedule.max_steps is None else min(total, recipe.schedule.max_steps)
    return Schedule(
        steps_per_epoch, total, last, warmup, recipe.optim.base_lr * scale, recipe.optim.base_min_lr * scale
    )


def every_steps(recipe: Recipe, schedule: Schedule) -> int:
    """Steps between two checkpoints."""
    if recipe.checkpoint.every_steps is not None:
        return recipe.checkpoint.every_steps
    return max(1, round(recipe.checkpoint.every_epochs * schedule.steps_per_epoch))


def pictures_every_steps(recipe: Recipe, schedule: Schedule) -> int:
    """Steps between two pictures; 0: none."""
    if recipe.log.pictures_every_steps is not None:
        return recipe.log.pictures_every_steps
    return schedule.steps_per_epoch
