"""Optimisers and schedules in real runs: the rates that the recipe says, and the same numbers after a resume."""

from typing import Any

import pytest

#: Run: overrides. Each is also taken in two parts; five steps are an epoch.
RUNS = {
    "adam": ["optim.name=adam", "zero.stage=1", "compute.dtype=bf16"],
    "lars": ["optim.name=lars", "optim.trust=0.1"],
    "decay": ["optim.weight_decay=0.1", "optim.weight_decay_end=9", "zero.stage=2"],
    "drops": ["schedule.shape=steps", "schedule.milestones=[0.8]", "schedule.stepping=epoch"],
}
SHORT = ["optim.base_lr=0.5", "schedule.warmup_epochs=0", "schedule.max_steps=7", "checkpoint.every_steps=1"]


@pytest.fixture(scope="module")
def runs(toy: Any) -> Any:
    """All of them in one process, and a second one for the rest of those that stop after three steps."""
    whole = {f"kinds_{name}": {"overrides": [*SHORT, *words]} for name, words in RUNS.items()}
    parts = {f"{name}_parts": {"overrides": entry["overrides"]} for name, entry in whole.items()}
    begun = {name: {"overrides": [*entry["overrides"], "schedule.max_steps=3"]} for name, entry in parts.items()}
    whole["kinds_constant"] = {"overrides": [*SHORT, "optim.weight_decay=0.1", "zero.stage=2"]}
    codes = toy.drive(whole | begun, ranks=1)
    codes |= {f"{name} again": code for name, code in toy.drive(parts, ranks=1).items()}
    assert set(codes.values()) == {0}, codes
    return toy


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_is_the_whole_one(runs: Any, name: str) -> None:
    losses = runs.losses(f"kinds_{name}")
    assert len(losses) == 7 and runs.losses(f"kinds_{name}_parts") == losses
    assert len(set(losses)) == 7, "it trains"


def test_weight_decay_grows_as_the_recipe_says(runs: Any) -> None:
    grown, constant = runs.losses("kinds_decay"), runs.losses("kinds_constant")
    assert grown[:2] == constant[:2], "the first update decays by the start value in both"
    assert all(one != other for one, other in zip(grown[2:], constant[2:], strict=True))


def test_logged_rates_are_those_of_the_shape(runs: Any) -> None:
    rates = [record["optim/lr"] for record in runs.records("kinds_drops")]
    peak = 0.5 * 8 / 256
    assert rates == pytest.approx([peak] * 5 + [peak / 10] * 2, rel=1e-12)
