"""Number of steps, and the rates of each: pure functions of the recipe and the step, so nothing has to be saved.

timm's and torch's schedulers are not used: each knows one rule for the ends of its warm-up, and all of them keep a
state that a resumed run would have to restore. Official ones differ by that rule, by where the decay is counted from,
and by whether they change with the step or the epoch; here these are values of the recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.errors import RecipeError
from pretrain.objectives.base import Objective
from pretrain.recipe.rates import actual_rates, half_cosine, rate_scales
from pretrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Schedule:
    """Length and rates of a run. All lengths are optimiser steps.

    Attributes:
        steps_per_epoch: of one pass over the data.
        total: of the whole schedule.
        last: after which this run ends, `total` or `schedule.max_steps`.
        warmup: of linear warm-up from `warmup_start` to `peak`; `warmup_ends` says which ends are included.
        peak: largest learning rate.
        floor: learning rate that the decay leads to; a cosine or line approaches it but never quite reaches it.
        shape: of what follows the warm-up, a key of `SHAPES`.
        decay_from: step at which a cosine or line begins; None: where the warm-up ends.
        milestones: steps from which on the rate is multiplied by `gamma` once more.
        hold: steps that share one rate: 1, or those of an epoch.
        lag: steps by which the whole curve comes late.
        weight_decay_ends: weight decay at the start and at the end; None: constant.
    """

    steps_per_epoch: int
    total: int
    last: int
    warmup: int
    peak: float
    floor: float
    shape: str = "cosine"
    warmup_start: float = 0.0
    warmup_ends: str = "both"
    decay_from: int | None = None
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    hold: int = 1
    lag: int = 0
    weight_decay_ends: tuple[float, float] | None = None

    def lr(self, step: int) -> float:
        """Compute the learning rate of step `step`, counted from 0."""
        position = self._position(step)
        if position >= self.warmup:
            return SHAPES[self.shape](self, position)
        done, whole = WARMUP_ENDS[self.warmup_ends](position, self.warmup, self.hold)
        # A warm-up of one step with both ends on its line has a line of no length.
        return self.warmup_start + (self.peak - self.warmup_start) * done / max(1, whole)

    def weight_decay(self, step: int) -> float | None:
        """Compute the weight decay of a step; None: constant (VideoMAE, utils.cosine_scheduler without warm-up)."""
        if self.weight_decay_ends is None:
            return None
        return half_cosine(*self.weight_decay_ends, self._position(step) / self.total)

    def steps_in(self, epochs: float) -> int:
        """Count the steps of some passes over the data, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def epoch(self, steps_done: int) -> float:
        """Count passes over the data after `steps_done` steps."""
        return steps_done / self.steps_per_epoch

    def progress(self, position: int) -> float:
        """Compute the share of the decay that lies behind at a step: 0 before it begins, 1 at the schedule's end."""
        begin = self.warmup if self.decay_from is None else self.decay_from
        return min(max(0.0, (position - begin) / max(1, self.total - begin)), 1.0)

    def _position(self, step: int) -> int:
        """Find the step whose rate step `step` has: that of its epoch's beginning, or of one before."""
        return max(0, step // self.hold * self.hold - self.lag)


def _cosine(schedule: Schedule, position: int) -> float:
    return half_cosine(schedule.peak, schedule.floor, schedule.progress(position))


def _linear(schedule: Schedule, position: int) -> float:
    return schedule.peak + (schedule.floor - schedule.peak) * schedule.progress(position)


def _steps(schedule: Schedule, position: int) -> float:
    passed = sum(position >= milestone for milestone in schedule.milestones)
    return float(schedule.peak * schedule.gamma**passed)


def _constant(schedule: Schedule, position: int) -> float:
    return schedule.peak


#: `schedule.shape`: learning rate at a step after the warm-up.
SHAPES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "steps": _steps,
    "constant": _constant,
}

#: `schedule.warmup_ends`: from step, length of the warm-up and steps that share a rate to (part done, whole).
WARMUP_ENDS: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    # VideoMAE's linspace(start, peak, W) reaches the peak in its last step; timm's lr * t / W does not ("start").
    "both": lambda step, warmup, hold: (step, warmup - hold),
    "start": lambda step, warmup, hold: (step, warmup),
    "end": lambda step, warmup, hold: (step + hold, warmup),
}


def build_schedule(recipe: Recipe, steps_per_epoch: int, epoch_samples: int | None = None) -> Schedule:
    """Build the schedule of a recipe whose data gives `steps_per_epoch` steps a pass.

    Args:
        recipe: the run.
        steps_per_epoch: optimiser steps of one pass.
        epoch_samples: samples that it serves, for the message where they make no step.

    Raises:
        RecipeError: no step in an epoch, or a warm-up, decay or milestone that doesn't fit into the schedule.
    """
    if steps_per_epoch < 1:
        raise RecipeError(
            f"batch.samples: a step takes {recipe.batch.samples} samples, more than an epoch has"
            + ("" if epoch_samples is None else f" ({epoch_samples})")
            + f", which is a multiple of data.lanes={recipe.data.lanes}; lower batch.samples or data.lanes, or set "
            "data.epoch_samples higher"
        )
    asked, optim, rates = recipe.schedule, recipe.optim, actual_rates(recipe)
    total = asked.steps or max(1, round(asked.epochs * steps_per_epoch))
    milestones = _milestones(recipe, steps_per_epoch)
    hold = steps_per_epoch if asked.stepping == "epoch" else 1
    ends = {"steps": rates.peak * asked.gamma ** len(milestones), "constant": rates.peak}
    schedule = Schedule(
        steps_per_epoch,
        total,
        last=total if asked.max_steps is None else min(total, asked.max_steps),
        warmup=int(asked.warmup_epochs * steps_per_epoch) if asked.warmup_steps is None else asked.warmup_steps,
        peak=rates.peak,
        floor=ends.get(asked.shape, rates.floor),
        shape=asked.shape,
        warmup_start=rates.warmup_start,
        warmup_ends=asked.warmup_ends,
        decay_from=None if asked.decay_from_epoch is None else round(asked.decay_from_epoch * steps_per_epoch),
        milestones=milestones,
        gamma=asked.gamma,
        hold=hold,
        lag=asked.lag * hold,
        weight_decay_ends=None if optim.weight_decay_end is None else (optim.weight_decay, optim.weight_decay_end),
    )
    _check_fits(recipe, schedule)
    return schedule


def _milestones(recipe: Recipe, steps_per_epoch: int) -> tuple[int, ...]:
    asked = recipe.schedule
    if asked.shape != "steps":
        return ()
    if asked.milestone_steps is not None:
        return tuple(asked.milestone_steps)
    return tuple(round(epoch * steps_per_epoch) for epoch in asked.milestones or [])


def _check_fits(recipe: Recipe, schedule: Schedule) -> None:
    """Compare lengths given in steps with those in epochs, which takes the data; `check_recipe` compares like ones."""
    asked, total = recipe.schedule, schedule.total
    length = f"schedule.epochs: {asked.epochs}" if asked.steps is None else f"schedule.steps: {asked.steps}"
    if 0 < schedule.warmup >= total:
        raise RecipeError(
            f"schedule.warmup_epochs: {asked.warmup_epochs} epochs of warm-up are not shorter than {length}"
            if asked.warmup_steps is None
            else f"schedule.warmup_steps: {asked.warmup_steps} steps of warm-up are not shorter than {length}, "
            f"which is {total} steps"
        )
    key = "milestones" if asked.milestone_steps is None else "milestone_steps"
    if schedule.milestones and schedule.milestones[0] < schedule.warmup:
        raise RecipeError(
            f"schedule.{key}: the first is at step {schedule.milestones[0]}, within the {schedule.warmup} steps of "
            "warm-up; shorten the warm-up (schedule.warmup_epochs, schedule.warmup_steps)"
        )
    if schedule.milestones and schedule.milestones[-1] >= total:
        raise RecipeError(
            f"schedule.{key}: the last is at step {schedule.milestones[-1]}, and the schedule ends after {total} "
            f"({length}); leave it out or make the schedule longer"
        )
    if schedule.shape in ("cosine", "linear") and (schedule.decay_from or 0) >= total:
        raise RecipeError(
            f"schedule.decay_from_epoch: {asked.decay_from_epoch} is step {schedule.decay_from}, and the schedule ends "
            f"after {total} ({length})"
        )


def describe_schedule(recipe: Recipe, schedule: Schedule) -> str:
    """Describe the schedule for the log of the start: lengths, shape, and how the rate follows from the batch."""
    optim, scaled = recipe.optim, rate_scales(recipe.optim, "base_lr")
    formula = f"{optim.base_lr:g} x {recipe.batch.samples} / {optim.base_batch} = " if scaled else ""
    down = "" if schedule.shape == "constant" else f", down to {schedule.floor:.4g}"
    return (
        f"{schedule.steps_per_epoch} steps an epoch, {schedule.total} steps, warm-up {schedule.warmup}, "
        f"{schedule.shape}; lr = {formula}{schedule.peak:.4g}{down}"
    )


def every_steps(recipe: Recipe, schedule: Schedule) -> int:
    """Compute the steps between two checkpoints."""
    if recipe.checkpoint.every_steps is not None:
        return recipe.checkpoint.every_steps
    return schedule.steps_in(recipe.checkpoint.every_epochs)


def pictures_every_steps(recipe: Recipe, schedule: Schedule, objective: Objective) -> int:
    """Compute the steps between two pictures; 0: none."""
    # A method that draws none must not pay for clips, and for an interruption, on every rank.
    if type(objective).pictures is Objective.pictures:
        return 0
    if recipe.log.pictures_every_steps is not None:
        return recipe.log.pictures_every_steps
    return schedule.steps_per_epoch
