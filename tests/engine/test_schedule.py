import dataclasses

import numpy as np
import pytest
from omegaconf import OmegaConf

from pretrain.engine.schedules import Schedule, build_schedule
from pretrain.errors import RecipeError
from pretrain.recipe.schema import Input, Recipe


def recipe(samples: int = 512, epochs: float = 10, warmup: float = 2, max_steps: int | None = None) -> Recipe:
    config = OmegaConf.structured(Recipe(model={}, objective={}, input=Input()))
    config.run.name = "test"
    made: Recipe = OmegaConf.to_object(config)
    made.batch.samples = samples
    made.schedule = dataclasses.replace(made.schedule, epochs=epochs, warmup_epochs=warmup, max_steps=max_steps)
    return made


def official(base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: int) -> np.ndarray:
    """utils.cosine_scheduler of the official repositories, in words of their own: one value a step."""
    warmup = warmup_epochs * steps_per_epoch
    rest = np.arange(epochs * steps_per_epoch - warmup)
    cosine = [final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(rest))) for i in rest]
    return np.concatenate([np.linspace(0, base, warmup), cosine])


@pytest.mark.parametrize(("epochs", "steps_per_epoch", "warmup"), [(10, 7, 2), (3, 1, 1), (5, 4, 0), (800, 3, 40)])
def test_rates_equal_the_official_schedule(epochs: int, steps_per_epoch: int, warmup: int) -> None:
    schedule = build_schedule(recipe(epochs=epochs, warmup=warmup), steps_per_epoch)
    expected = official(1.5e-4 * 2, 1e-5 * 2, epochs, steps_per_epoch, warmup)
    assert schedule.total == len(expected)
    np.testing.assert_allclose([schedule.lr(step) for step in range(schedule.total)], expected, rtol=1e-12, atol=0)


def test_warm_up_starts_at_zero_and_reaches_the_peak() -> None:
    schedule = build_schedule(recipe(), steps_per_epoch=5)
    assert schedule.lr(0) == 0
    assert schedule.lr(9) == schedule.peak == schedule.lr(10)


def test_views_do_not_scale_the_rate() -> None:
    four = recipe()
    four.input.views = 4
    assert build_schedule(four, 5).peak == build_schedule(recipe(), 5).peak


def test_max_steps_ends_the_run_and_leaves_the_rates_alone() -> None:
    whole, cut = build_schedule(recipe(), 5), build_schedule(recipe(max_steps=13), 5)
    assert (cut.last, cut.total) == (13, whole.total)
    assert [cut.lr(step) for step in range(13)] == [whole.lr(step) for step in range(13)]


def test_epochs_that_are_no_whole_number() -> None:
    assert build_schedule(recipe(epochs=0.29, warmup=0), steps_per_epoch=100).total == 29


@pytest.mark.parametrize(("changes", "steps_per_epoch"), [({"warmup": 10}, 5), ({}, 0)])
def test_impossible_schedules_are_refused(changes: dict[str, float], steps_per_epoch: int) -> None:
    with pytest.raises(RecipeError, match=r"schedule.warmup_epochs|batch.samples"):
        build_schedule(recipe(**changes), steps_per_epoch)


def test_rate_is_a_function_of_the_step() -> None:
    schedule = Schedule(steps_per_epoch=5, total=50, last=50, warmup=10, peak=1.0, floor=0.1)
    backwards = [schedule.lr(step) for step in reversed(range(50))]
    assert backwards == [schedule.lr(step) for step in range(50)][::-1]
