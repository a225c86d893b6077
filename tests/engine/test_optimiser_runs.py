"""Optimisers, schedules and sources in runs on two ranks: what the recipe says, and a resume that changes nothing."""

import json
from typing import Any

import pytest

SGD = ["optim.name=sgd", "optim.base_lr=1", "optim.weight_decay=0.1", "schedule.max_steps=6"]
SHORT = ["optim.base_lr=0.5", "schedule.max_steps=7"]
DROPS = ["schedule.shape=steps", "schedule.milestones=[0.8]", "schedule.stepping=epoch"]
#: Run: overrides; five steps are an epoch. The first is torch's optimiser as it is.
RUNS = {
    "sgd": [*SGD, "zero.stage=0"],
    "sgd bf16": [*SGD, "zero.stage=0", "compute.dtype=bf16"],
    "sgd bf16 stage 1": [*SGD, "zero.stage=1", "compute.dtype=bf16"],
    "sgd stage 2": [*SGD, "zero.stage=2"],
    "adam": [*SHORT, "optim.name=adam", "zero.stage=1", "compute.dtype=bf16"],
    "lars": [*SHORT, *DROPS, "optim.name=lars", "optim.trust=0.1"],
    "decay": [*SHORT, "optim.weight_decay=0.1", "optim.weight_decay_end=9", "zero.stage=2"],
    "constant": [*SHORT, "optim.weight_decay=0.1", "zero.stage=2"],
    "alternate": [*SHORT, "data.compose=alternate", "data.sources.other.shards=SHARDS", "zero.stage=1"],
    # Stage 3 comes last, see test_ranks.py.
    "sgd stage 3": [*SGD, "zero.stage=3"],
}
RESUMED = ("sgd bf16 stage 1", "adam", "lars", "decay", "alternate", "sgd stage 3")


@pytest.fixture(scope="module")
def runs(toy: Any) -> Any:
    """All of them in one set of processes, and a second one for the rest of those that stop after three steps."""
    common = ["schedule.warmup_epochs=0", "checkpoint.every_steps=3"]
    plan, rest = {}, {}
    for name, words in RUNS.items():
        words = [word.replace("SHARDS", str(toy.folder / "shards")) for word in words]
        plan[name] = {"overrides": [*common, *words]}
        if name in RESUMED:
            plan[f"{name}, parts"] = {"overrides": [*common, *words, "schedule.max_steps=3"]}
            rest[f"{name}, parts"] = plan[name]
    codes = toy.drive(plan, ranks=2)
    codes |= {f"{name} again": code for name, code in toy.drive(rest, ranks=2).items()}
    assert set(codes.values()) == {0}, codes
    return toy


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_take_the_same_steps(runs: Any, stage: int) -> None:
    assert runs.losses(f"sgd stage {stage}") == pytest.approx(runs.losses("sgd"), rel=1e-4)


@pytest.mark.parametrize("name", ["sgd bf16", "sgd bf16 stage 1"])
def test_bf16_is_close(runs: Any, name: str) -> None:
    assert runs.losses(name) == pytest.approx(runs.losses("sgd"), rel=0.02)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_the_whole_one(runs: Any, name: str) -> None:
    losses = runs.losses(name)
    assert len(losses) == len(set(losses)) == (6 if name.startswith("sgd") else 7), "it trains"
    assert runs.losses(f"{name}, parts") == losses


def test_weight_decay_grows_as_the_recipe_says(runs: Any) -> None:
    grown, constant = runs.losses("decay"), runs.losses("constant")
    assert grown[:2] == constant[:2], "the first update decays by the start value in both"
    assert all(one != other for one, other in zip(grown[2:], constant[2:], strict=True))


def test_logged_rates_are_those_of_the_shape(runs: Any) -> None:
    rates = [record["optim/lr"] for record in runs.records("lars")]
    peak = 0.5 * 8 / 256
    assert rates == pytest.approx([peak] * 5 + [peak / 10] * 2, rel=1e-12)


def test_sources_that_alternate_are_judged_by_their_own_losses(runs: Any) -> None:
    losses = runs.losses("alternate")
    for name in ("alternate", "alternate, parts"):
        path = runs.folder / name / "checkpoints" / "step_00000007" / "state.json"
        windows = json.loads(path.read_text())["guard"]["windows"]
        assert {source: windows[source] for source in ("toy", "other")} == {"toy": losses[::2], "other": losses[1::2]}
