"""Runs on two ranks, all in one launch: ZeRO stages, number formats, accumulation, accidents, stopping."""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toy_shards import index

STEPS = 10
SIGNAL = ("zero.stage=1", "batch.micro=4")
#: Bad steps of one run: what happens on rank 1 in which micro-batch of two a step. Any of them must count.
BAD = {4: [7, 1, "nan"], 6: [12, 1, "inf"], 8: [15, 1, "gradient"]}


def plain(*overrides: str, accidents: list[list[Any]] | None = None) -> dict[str, Any]:
    """One run for toy_driver.py."""
    return {"overrides": list(overrides), "accidents": accidents or []}


def runs() -> dict[str, dict[str, Any]]:
    """The plan: overrides and accidents of each run by name."""
    plan: dict[str, dict[str, Any]] = {}
    # Stage 3 comes last: DeepSpeed replaces torch.nn.functional.linear for it and never puts it back, and the other
    # stages would round differently from here on.
    for stage in range(4):
        if stage == 3:
            plan |= unsharded_only()
        here = f"zero.stage={stage}"
        plan[f"fp32 {stage}"] = plain(here, "batch.micro=2")
        plan[f"bf16 {stage}"] = plain(here, "compute.dtype=bf16", "batch.micro=2")
        if stage != 2:
            plan[f"bad {stage}"] = plain(here, "batch.micro=2", accidents=list(BAD.values()))
    plan["sharded build"] = plain("zero.stage=3", "zero.init=always", "log.pictures_every_steps=5")
    return plan


def unsharded_only() -> dict[str, dict[str, Any]]:
    """Runs that one stage is enough for."""
    plan = {}
    plan["4 at once"] = plain("zero.stage=1", "batch.micro=4")
    plan["1 at once"] = plain("zero.stage=1", "batch.micro=1")
    plan["offload"] = plain("zero.stage=2", "zero.offload=cpu", "batch.micro=2")
    plan["nan, stop"] = plain("batch.micro=4", "guard.nonfinite=stop", accidents=[[6, 1, "nan"]])
    spoilt = [[call, 0, "nan"] for call in range(3, 8)]
    plan["nan, too often"] = plain("batch.micro=4", "guard.max_skips=2", accidents=spoilt)
    plan["signal"] = plain(*SIGNAL, accidents=[[3, 1, "SIGUSR1"]])
    plan["signal, again"] = plain(*SIGNAL, "run.dir=signal")
    # In place of a host with an older copy: the same recipe, but other files at its path.
    plan["data of a rank"] = plain("batch.micro=4") | {"on_rank": {"1": ["data.sources.toy.shards=other of a rank"]}}
    plan["renamed"] = plain("batch.micro=4", accidents=[[3, 1, "rename the folder"]])
    plan["metrics gone"] = plain("batch.micro=4", accidents=[[3, 1, "delete the metrics"]])
    plan["Ctrl-C"] = plain(*SIGNAL, accidents=[[3, 1, "SIGINT"]])
    plan["terminal closed"] = plain(*SIGNAL, accidents=[[3, 1, "SIGHUP"]])
    plan["stop file"] = plain("batch.micro=4", accidents=[[3, 1, "stop file"]])
    return plan


@pytest.fixture(scope="module")
def outcome(toy: Any) -> dict[str, int | str]:
    """Exit code, or error, of each run."""
    other = toy.folder / "other of a rank"
    other.mkdir()
    shutil.copyfile(toy.folder / "shards" / "toy-000000.tar", other / "toy-000000.tar")
    index(other)
    results: dict[str, int | str] = toy.drive(runs(), ranks=2)
    return results


@pytest.fixture(scope="module")
def alone(toy: Any) -> list[float]:
    """Losses of one process in float32 without ZeRO."""
    toy.train("alone", "zero.stage=0")
    losses: list[float] = toy.losses("alone")
    assert len(losses) == STEPS
    return losses


@pytest.mark.parametrize("name", [*(f"fp32 {stage}" for stage in range(4)), "sharded build", "offload"])
def test_two_ranks_learn_what_one_process_learns(toy: Any, outcome: Any, alone: list[float], name: str) -> None:
    assert outcome[name] == 0
    np.testing.assert_allclose(toy.losses(name), alone, rtol=2e-5)
    assert np.ptp(alone) > 0.01, "a curve that does not move proves nothing"


@pytest.mark.parametrize("stage", range(4))
def test_bf16_is_close_to_float32(toy: Any, outcome: Any, alone: list[float], stage: int) -> None:
    assert outcome[f"bf16 {stage}"] == 0
    np.testing.assert_allclose(toy.losses(f"bf16 {stage}"), alone, rtol=1e-3)
    norms = [[record["optim/grad_norm"] for record in toy.records(f"{dtype} {stage}")] for dtype in ("bf16", "fp32")]
    np.testing.assert_allclose(*norms, rtol=0.05)


def test_accumulation_4_x_1_equals_1_x_4(toy: Any, outcome: Any) -> None:
    assert (outcome["4 at once"], outcome["1 at once"]) == (0, 0)
    np.testing.assert_allclose(toy.losses("1 at once"), toy.losses("4 at once"), rtol=2e-5)


@pytest.mark.parametrize("stage", (0, 1, 3))
def test_one_bad_micro_batch_of_one_rank_leaves_the_update_out_on_all(toy: Any, outcome: Any, stage: int) -> None:
    assert outcome[f"bad {stage}"] == 0
    spoilt, sound = toy.records(f"bad {stage}"), toy.records(f"fp32 {stage}")
    assert [record["step"] for record in spoilt if record["optim/skipped"]] == list(BAD)
    assert [spoilt[step - 1]["optim/grad_norm"] for step in BAD] == ["inf"] * 3
    losses = np.array([float(record["train/loss"]) for record in spoilt])
    assert losses[:3].tolist() == [record["train/loss"] for record in sound[:3]]
    assert np.flatnonzero(~np.isfinite(losses)).tolist() == [3, 5], "with a bad gradient the loss is finite"
    # The step after it sees the weights before it, so its loss is not that of the sound run.
    assert losses[4] != sound[4]["train/loss"]


def test_a_rank_with_other_data_is_named_at_the_start(toy: Any, outcome: Any) -> None:
    error = str(outcome["data of a rank"])
    assert error.startswith("TrainingError") and f"data of toy: host {platform.node()} (rank 1): fingerprint" in error
    assert not (toy.folder / "data of a rank" / "metrics.jsonl").exists()


def test_stop_policy_ends_the_run_at_that_step(toy: Any, outcome: Any) -> None:
    assert outcome["nan, stop"].startswith("TrainingError: step 6: the loss is not finite")
    assert len(toy.records("nan, stop")) == 6
    assert toy.checkpoints("nan, stop") == ["step_00000004"]


def test_too_many_skips_in_a_row_end_the_run(toy: Any, outcome: Any) -> None:
    assert outcome["nan, too often"].startswith(
        "TrainingError: step 5: the loss is not finite, 3 steps in a row without an update (guard.max_skips = 2)"
    )
    assert len(toy.records("nan, too often")) == 5


@pytest.mark.parametrize("name", ["renamed", "metrics gone"])
def test_a_folder_that_is_taken_away_is_made_again(toy: Any, outcome: Any, name: str) -> None:
    assert outcome[name] == 0
    assert [record["step"] for record in toy.records(name)] == list(range(1, STEPS + 1)), "nothing is lost or doubled"
    assert toy.losses(name) == toy.losses("4 at once")
    assert toy.checkpoints(name) == ["step_00000008", "step_00000010"]
    assert {"recipe.yaml", "environment.json", "summary.json"} <= {path.name for path in (toy.folder / name).iterdir()}
    log = (toy.folder / name / "logs" / "rank_00000.log").read_text()
    assert "metrics.jsonl was deleted, renamed or replaced" in log
    assert (f"the folder was renamed to {toy.folder / name} moved" in log) == (name == "renamed")


@pytest.mark.parametrize("name", ["Ctrl-C", "terminal closed"])
def test_a_terminal_that_wants_an_end_gets_a_save(toy: Any, outcome: Any, name: str) -> None:
    assert outcome[name] == 75
    assert toy.checkpoints(name) == [f"step_{len(toy.records(name)):08d}"] and len(toy.records(name)) < STEPS


def test_stopping_saves_at_the_step_that_all_ranks_agree_on(toy: Any, outcome: Any) -> None:
    name = "stop file"
    assert outcome[name] == 75
    # Rank 1 touches the file in its third step; rank 0 may have looked for that step before it is there.
    step = len(toy.records(name))
    assert step in (3, 4)
    assert toy.checkpoints(name) == [f"step_{step:08d}"]
    summary = json.loads((toy.folder / name / "summary.json").read_text())
    assert (summary["exit_code"], summary["steps"]) == (75, step)
    assert not (toy.folder / name / "stop").exists()


def test_run_stopped_by_a_signal_to_one_rank_goes_on_with_the_same_losses(toy: Any, outcome: Any) -> None:
    assert (outcome["signal"], outcome["signal, again"]) == (75, 0)
    assert toy.losses("signal") == toy.losses("4 at once")
    assert "SIGUSR1 at rank 1: 3 steps" in (toy.folder / "signal" / "logs" / "rank_00000.log").read_text()


def test_the_run_folder_tells_what_happened(toy: Any, outcome: Any) -> None:
    folder: Path = toy.folder / "sharded build"
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        f"step_{step:08d}.{kind}" for step in (5, 10) for kind in ("png", "gif")
    }
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["variables"]["WORLD_SIZE"] == "2"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["reason"], summary["steps"], summary["epochs"]) == ("done", STEPS, 2.0)
    assert Path(summary["picture"]).is_file()
    assert (folder / "logs" / "rank_00001.log").is_file()
    keys: Callable[[dict[str, Any]], set[str]] = set
    assert keys(toy.records("sharded build")[0]) >= {
        *("step", "epoch", "train/loss", "optim/lr", "optim/grad_norm", "optim/skipped", "data/bad_samples"),
        *("speed/clips_per_s", "speed/tokens_per_s", "speed/mfu", "speed/data_wait_share", "memory/peak_gib"),
    }
