"""Checks of optimiser and schedule: what can't work, and keys that the chosen optimiser or shape doesn't read."""

from itertools import pairwise
from typing import Any

from pretrain.recipe.optimisers import OPTIMISERS
from pretrain.recipe.rates import actual_rates, rate_scales
from pretrain.recipe.schema import Recipe

#: Keys, with their section, that only some shapes of the learning rate read.
SHAPE_KEYS = {
    "cosine": ("optim.base_min_lr", "schedule.decay_from_epoch"),
    "linear": ("optim.base_min_lr", "schedule.decay_from_epoch"),
    "steps": ("schedule.milestones", "schedule.milestone_steps", "schedule.gamma"),
    "constant": (),
}

#: Keys that another key, once it is set, takes the place of.
REPLACED_BY = {
    "schedule.epochs": "schedule.steps",
    "schedule.warmup_epochs": "schedule.warmup_steps",
}


def optim_problems(recipe: Recipe) -> list[str]:
    """List what in `optim` can't work."""
    optim, problems = recipe.optim, []
    if not 0 <= optim.momentum < 1:
        problems.append(f"optim.momentum: found {optim.momentum}, allowed: a number from 0 to below 1")
    if not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas: found {list(optim.betas)}, allowed: two numbers from 0 to below 1")
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        problems.append("optim.nesterov: true, and optim.momentum is 0, which there is nothing to correct of")
    kind = OPTIMISERS[optim.name]
    if not kind.sharded and recipe.zero.stage != 0:
        problems.append(
            f"zero.stage: found {recipe.zero.stage}, allowed with optim.name={optim.name}: 0 ({kind.title} needs the "
            "norm of whole tensors, and ZeRO's optimisers see pieces of them)"
        )
    if optim.weight_decay_end is not None and optim.weight_decay == 0:
        problems.append(
            f"optim.weight_decay_end: {optim.weight_decay_end:g}, and optim.weight_decay is 0, which turns decay off; "
            "begin with a small one"
        )
    return problems


def schedule_problems(recipe: Recipe) -> list[str]:
    """List what in `schedule` can't work, as far as it shows without the data's number of steps an epoch."""
    return [*_lengths(recipe), *_decay_problems(recipe), *_milestone_problems(recipe), *_rate_problems(recipe)]


def optim_warnings(recipe: Recipe) -> list[str]:
    """List keys of `optim` and `schedule` that are set and do nothing."""
    name, shape = recipe.optim.name, recipe.schedule.shape
    reasons = {
        f"optim.{key}": f"optim.name is {name}"
        for kind in OPTIMISERS.values()
        for key in kind.keys
        if key not in OPTIMISERS[name].keys
    }
    reasons |= {
        key: f"schedule.shape is {shape}"
        for keys in SHAPE_KEYS.values()
        for key in keys
        if key not in SHAPE_KEYS[shape]
    }
    reasons |= {key: f"{other} is set" for key, other in REPLACED_BY.items() if _value(recipe, other) is not None}
    if not _has_warmup(recipe):
        reasons |= {key: "there is no warm-up" for key in ("optim.base_warmup_lr", "schedule.warmup_ends")}
    if recipe.optim.scaled == "none":
        reasons["optim.base_batch"] = "optim.scaled is none"
    return [f"{key} has no effect: {reason}" for key, reason in reasons.items() if is_changed(recipe, key)]


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def is_changed(recipe: Recipe, key: str) -> bool:
    """Tell whether a key of a section has another value than its default."""
    section, _, name = key.partition(".")
    # Of a new section, not of its class: defaults made by a factory are no attributes of the class.
    return _value(recipe, key) != getattr(type(getattr(recipe, section))(), name)


def _has_warmup(recipe: Recipe) -> bool:
    schedule = recipe.schedule
    return (schedule.warmup_epochs if schedule.warmup_steps is None else schedule.warmup_steps) > 0


def _lengths(recipe: Recipe) -> list[str]:
    schedule, problems = recipe.schedule, []
    if schedule.warmup_steps is not None:
        if schedule.stepping == "epoch":
            problems.append(
                "schedule.warmup_steps: the rate changes with each epoch only (schedule.stepping=epoch); "
                "give schedule.warmup_epochs"
            )
        if schedule.steps is not None and 0 < schedule.steps <= schedule.warmup_steps:
            problems.append(
                f"schedule.warmup_steps: {schedule.warmup_steps} is not less than schedule.steps = {schedule.steps}"
            )
    elif schedule.steps is None and 0 < schedule.epochs <= schedule.warmup_epochs:
        problems.append(
            f"schedule.warmup_epochs: {schedule.warmup_epochs:g} is not less than schedule.epochs = {schedule.epochs:g}"
        )
    elif schedule.stepping == "epoch" and schedule.warmup_epochs != int(schedule.warmup_epochs):
        problems.append(
            f"schedule.warmup_epochs: found {schedule.warmup_epochs:g}, allowed with schedule.stepping=epoch: "
            "whole epochs"
        )
    return problems


def _decay_problems(recipe: Recipe) -> list[str]:
    schedule = recipe.schedule
    begin = schedule.decay_from_epoch
    if schedule.shape not in ("cosine", "linear") or begin is None or schedule.steps is not None:
        return []
    if 0 < schedule.epochs <= begin:
        return [f"schedule.decay_from_epoch: {begin:g} is not less than schedule.epochs = {schedule.epochs:g}"]
    return []


def _milestone_problems(recipe: Recipe) -> list[str]:
    schedule = recipe.schedule
    if schedule.shape != "steps":
        return []
    given = {
        "milestones": (schedule.milestones, "epochs", schedule.epochs if schedule.steps is None else None),
        "milestone_steps": (schedule.milestone_steps, "steps", schedule.steps),
    }
    found = {key: entry for key, entry in given.items() if entry[0] is not None}
    if len(found) != 1:
        words = "both are given" if found else "none is given, and without them the rate stays the same"
        return [f"schedule.milestones, schedule.milestone_steps: {words}; give one of them, or another schedule.shape"]
    ((key, (values, unit, end)),) = found.items()
    if not values or values[0] <= 0 or any(later <= earlier for earlier, later in pairwise(values)):
        return [f"schedule.{key}: found {list(values or [])}, allowed: rising numbers above 0"]
    if end is not None and values[-1] >= end > 0:
        return [
            f"schedule.{key}: {values[-1]:g} is not less than schedule.{unit} = {end:g}; "
            "leave it out or make the schedule longer"
        ]
    return []


def _rate_problems(recipe: Recipe) -> list[str]:
    if recipe.optim.base_batch < 1 or recipe.batch.samples < 1:
        return []  # reported as out of range
    rates, problems = actual_rates(recipe), []
    below = {"base_warmup_lr": (rates.warmup_start, "the warm-up goes up")} if _has_warmup(recipe) else {}
    if recipe.schedule.shape in ("cosine", "linear"):
        below["base_min_lr"] = (rates.floor, "the schedule goes down")
    for key, (rate, reason) in below.items():
        if rate > rates.peak:
            base = getattr(recipe.optim, key)
            actual = (
                ""
                if rate_scales(recipe.optim, key) == rate_scales(recipe.optim, "base_lr")
                else (f" (with optim.scaled={recipe.optim.scaled}: {rate:g} and {rates.peak:g})")
            )
            problems.append(
                f"optim.{key}: {base:g} is more than optim.base_lr = {recipe.optim.base_lr:g}{actual}, and {reason}; "
                "lower it"
            )
    return problems
