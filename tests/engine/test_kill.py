"""Kills at the worst moments: the same command continues, and the loss curve is that of a run that was left alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.toy_shards import forget_hashes, index

OPTIONS = ("zero.stage=2", "schedule.epochs=12", "data.workers=2", "checkpoint.every_steps=3")
#: Enough for a kill that comes late on a busy machine.
STEPS = 60


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.faults
def test_kill_9_of_two_ranks_with_two_workers_in_mid_epoch(toy: Any) -> None:
    toy.train("never killed", *OPTIONS, "data.workers=0", ranks=2)
    process = toy.start("killed", *OPTIONS, ranks=2)
    toy.wait_for("killed", 8, process)
    toy.kill(process)
    assert 8 <= len(toy.records("killed")) < STEPS, "the kill came too late to prove anything"
    output = toy.train("killed", *OPTIONS, ranks=2)
    assert "continuing from" in output
    assert [record["step"] for record in toy.records("killed")] == list(range(1, STEPS + 1))
    killed, whole = toy.records("killed"), toy.records("never killed")
    for key in ("train/loss", "optim/grad_norm", "optim/lr"):
        assert [record[key] for record in killed] == [record[key] for record in whole]


def test_a_stop_leaves_through_the_launcher_with_75_and_a_published_checkpoint(toy: Any) -> None:
    toy.train("no time", *OPTIONS, "run.time_limit_minutes=0.01", ranks=2, expect=75)
    assert toy.checkpoints("no time") == ["step_00000001"]
    assert json.loads((toy.folder / "no time" / "summary.json").read_text())["reason"] == "wall-clock limit"


@pytest.fixture(scope="module")
def alone(toy: Any) -> list[float]:
    """Losses of one process that was left alone, and began before the index had hashes of its member tables."""
    early = shutil.copytree(toy.folder / "shards", toy.folder / "early shards")
    forget_hashes(early)
    output = toy.train("left alone", f"data.sources.toy.shards={early}")
    assert output.count(f"launch/pack.py --index-only {early} adds them") == 1
    losses: list[float] = toy.losses("left alone")
    return losses


@pytest.mark.faults
def test_kill_between_the_last_write_and_the_rename(toy: Any, alone: list[float]) -> None:
    """And the newest checkpoint is damaged as well, so the run goes back two."""
    accident = {"overrides": ["checkpoint.every_steps=2"], "accidents": [[12, 0, "kill in the middle of publishing"]]}
    assert toy.drive({"unlucky": accident}, ranks=1, expect=-9) == {}
    root = toy.folder / "unlucky" / "checkpoints"
    assert toy.checkpoints("unlucky") == [".saving_step_00000006", "step_00000002", "step_00000004"]
    assert (root / ".saving_step_00000006" / "manifest.json").is_file()
    flip(next((root / "step_00000004" / "deepspeed").glob("*.pt")))
    output = toy.train("unlucky", "checkpoint.every_steps=2")
    assert "removing" in output and ".saving_step_00000006" in output
    assert "step_00000004 is damaged and skipped" in output
    assert "step_00000002, step 2" in output
    assert toy.losses("unlucky") == alone
    assert toy.checkpoints("unlucky") == ["step_00000008", "step_00000010"]


def test_a_finished_run_says_so_and_another_recipe_is_refused(toy: Any, alone: list[float]) -> None:
    before = (toy.folder / "left alone" / "metrics.jsonl").read_bytes()
    plan = {
        "left alone": {"overrides": []},
        "left alone ": {"overrides": [toy.run_dir("left alone"), "run.seed=3", "data.workers=1"]},
        "left  alone": {"overrides": [toy.run_dir("left alone")], "resume": "never"},
    }
    finished, other, never = toy.drive(plan, ranks=1).values()
    assert finished == 0, "of the recipe's own shards, whose index has the hashes"
    assert other.startswith("CheckpointError") and "run.seed: 0 -> 3" in other and "data.workers" not in other
    assert never.startswith("CheckpointError: --resume never")
    assert (toy.folder / "left alone" / "metrics.jsonl").read_bytes() == before


def test_other_data_under_the_same_name_is_refused(toy: Any, alone: list[float]) -> None:
    other = toy.folder / "other shards"
    other.mkdir()
    for number in (0, 1):  # as many samples, twice the same
        shutil.copy(toy.folder / "shards" / "toy-000000.tar", other / f"toy-{number:06d}.tar")
    index(other)
    overrides = [toy.run_dir("left alone"), f"data.sources.toy.shards={other}"]
    error = toy.drive({"other data": {"overrides": overrides}}, ranks=1)["other data"]
    assert error.startswith("CheckpointError") and "the data of toy is not what it was" in error


def test_what_a_checkpoint_says_of_itself(toy: Any, alone: list[float]) -> None:
    state_file = toy.folder / "left alone" / "checkpoints" / "step_00000010" / "state.json"
    state = json.loads(state_file.read_text())
    assert list(state["sources"]) == ["toy"]
    assert (state["step"], state["videos"], state["world_size"], state["zero_stage"]) == (10, 80, 1, 0)
    assert state["versions"]["deepspeed"]
    assert state["recipe"]["optim"]["betas"] == [0.9, 0.95]
