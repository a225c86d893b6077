"""Several labels a video, and values to regress: from shards through training, validation and test to a prediction."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.classification.predictions import average_precision
from finetune.commands import predict
from finetune.commands.finetune import PROGRAM
from finetune.recipe import load_tune_recipe
from pretrain.errors import RecipeError
from pretrain.objectives.base import Method
from pretrain.runtime import process_group
from pretrain.runtime.process_group import Ranks
from tests.plain_classifier import PlainTask

QUICK = ["schedule.epochs=1", "evaluate.every_epochs=1", "checkpoint.every_steps=3"]


def predictions(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Logits of each view, targets, and the scores that were reported."""
    folder = folder / "predictions" / "step_00000003"
    part = np.load(folder / "part_00000.npz")
    return part["logits"], part["targets"], json.loads((folder / "scores.json").read_text())


@pytest.fixture(scope="module")
def multi(toy: Any, relabelled: Any) -> Path:
    """Classes: moves down, moves sideways, moves left; some videos have two of them."""
    shards = relabelled("multi", {"down": [0], "left": [1, 2], "right": [1]})
    toy.run("multi_run", *QUICK, *shards, "objective.task=multi", "data.sources.toy.labels=integer")
    return Path(toy.folder / "multi_run")


@pytest.fixture(scope="module")
def regression(toy: Any, relabelled: Any) -> Path:
    """The speed in x and y."""
    shards = relabelled("speed", {"down": [0, 1.5], "left": [-1, 0], "right": [1, 0]})
    words = ["objective.task=regression", "model.classes=2", "augment.mixup=0", "augment.cutmix=0"]
    toy.run("speed_run", *QUICK, *shards, *words, "data.sources.toy.labels=integer", "optim.base_lr=0.3")
    return Path(toy.folder / "speed_run")


def test_several_labels(toy: Any, multi: Path) -> None:
    logits, targets, scores = predictions(multi)
    assert logits.shape == (11, 6, 3) and sorted(targets.sum(axis=1).tolist()) == [1] * 7 + [2] * 4
    probabilities = (1 / (1 + np.exp(-logits))).mean(axis=1)
    expected = np.mean([average_precision(probabilities[:, k], targets[:, k]) for k in range(3)])
    assert scores["mAP"] == pytest.approx(100 * expected, abs=1e-3) and scores["classes"] == 3
    evaluated = [record["eval/mAP"] for record in toy.records("multi_run") if "eval/mAP" in record]
    assert json.loads((multi / "best.json").read_text())["value"] == max(evaluated)


def test_values(toy: Any, regression: Path) -> None:
    logits, targets, scores = predictions(regression)
    assert logits.shape == (11, 6, 2) and {tuple(row) for row in targets.tolist()} == {(0, 1.5), (-1, 0), (1, 0)}
    error = logits.mean(axis=1) - targets
    assert scores["mae"] == pytest.approx(np.abs(error).mean(), abs=1e-5)
    assert scores["rmse"] == pytest.approx(np.sqrt(np.square(error).mean()), abs=1e-5)
    spread = np.square(targets - targets.mean(axis=0)).sum()
    assert scores["r2"] == pytest.approx(1 - np.square(error).sum() / spread, abs=1e-4)
    assert any("eval/r2" in record for record in toy.records("speed_run"))
    assert "confusion.png" not in {path.name for path in (regression / "predictions").rglob("*")}


def test_predictions_of_values_and_of_several_labels(
    toy: Any, multi: Path, regression: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = str(toy.clip())
    assert predict.main([clip, "--weights", str(regression), "--out", str(tmp_path / "a.png")]) == 0
    values = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(values) == 2 and not any("%" in line for line in values)
    assert predict.main([clip, "--weights", str(multi), "--out", str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().out.count(" % ") == 3


class Untested(PlainTask):
    """A task that measures nothing."""

    test = Method.test


def test_a_task_without_a_test_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The process group is this test process's own: nothing is trained.
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(process_group, "join", lambda: alone)
    monkeypatch.setattr(process_group, "leave", lambda ranks: None)
    task = Untested(load_tune_recipe("demo_finetune", [f"run.dir={tmp_path}"]))
    with pytest.raises(RecipeError, match="--test: objective.name=classification has no test"):
        PROGRAM.run(task, Namespace(test="best"))
