"""What extending costs, by doing it: docs/extending.md's files in a copy of the checkout, then packed, then trained."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pretrain.recipe.files import RECIPES
from tests.toy_run import train
from tests.toy_shards import encoded

ROOT = RECIPES.parent
SMALL = ["data.workers=0", "data.lanes=2", "data.shuffle_window=4", "batch.samples=4", "batch.micro=2"]
SHORT = ["schedule.epochs=2", "schedule.warmup_epochs=0", "optim.base_lr=0.1", "log.peak_tflops=1"]
QUIET = ["log.wandb=disabled", "compute.dtype=fp32"]


def write_clip(path: Path, brightness: int) -> None:
    """A bright square that moves down over 24 frames of 96 x 96 pixels."""
    frames = [np.full((96, 96, 3), brightness, np.uint8) for _ in range(24)]
    for t, frame in enumerate(frames):
        frame[2 * t : 2 * t + 24, 30:60] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(frames, rate=24))


def run(*command: str, root: Path) -> str:
    return train(command, 1, root, TUBELET_DATA=str(root / "shards"), PYTHONPATH="")


def steps_of(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the page's files added, and its data set packed."""
    root = tmp_path_factory.mktemp("checkout")
    for package in ("pretrain", "finetune", "launch", "recipes"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs/extending.md").read_text()
    added = re.findall(r"^```\w+\n# ((?:pretrain|finetune|recipes)/\S+)\n(.*?)^```$", page, re.M | re.S)
    for path, text in added:
        assert not (root / path).exists(), "an extension replaces nothing"
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(text)
    for number in range(8):
        write_clip(root / "videos" / "abc"[number % 3] / f"{number}.mp4", 20 * number)
    run("launch/pack.py", "videos", "shards/ours", "--short-side", "80", "--workers", "0", root=root)
    return root


@pytest.fixture(scope="module")
def exported(checkout: Path) -> Path:
    """The guide's masked autoencoder, trained with the guide's method and exported."""
    run("launch/pretrain.py", "--recipe", "pooled_motion", *SMALL, *SHORT, *QUIET, root=checkout)
    assert "parameters" in run("launch/export.py", "runs/pooled_motion", "out", root=checkout)
    return checkout / "out"


def test_new_method_backbone_and_data_set_train(checkout: Path, exported: Path) -> None:
    folder = checkout / "runs/pooled_motion"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    assert any("motion" in key for key in steps[0]), "a method's own metrics are logged"
    assert list((folder / "checkpoints").glob("step_*/manifest.json"))


def test_export_of_a_new_backbone(checkout: Path, exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    assert weights["encoder.mix.weight"].shape == (64, 64) and "decoder.2.bias" in weights
    card = (exported / "README.md").read_text()
    assert f"pooled, {sum(value.size for value in weights.values()):,} parameters" in card
    assert "8 x 64 x 64" in card and "train/loss" in card
    with pytest.raises(AssertionError, match="can be written as: safetensors"):
        run("launch/export.py", "runs/pooled_motion", "hf", "--format", "huggingface", root=checkout)


def test_new_kind_of_sample_trains(checkout: Path) -> None:
    run("launch/pretrain.py", "--recipe", "image_vit_order", *SMALL, *SHORT, *QUIET, "input.views=2", root=checkout)
    steps = steps_of(checkout / "runs/image_vit_order")
    assert len(steps) == 4 and all(0 <= step["train/right"] <= 1 for step in steps)
    with pytest.raises(AssertionError, match="objective order reconstructs no pixels"):
        run("launch/reconstruct.py", "runs/image_vit_order", "shards/ours", root=checkout)


def test_new_task_trains_the_new_classifier_from_the_export(checkout: Path, exported: Path) -> None:
    words = [f"run.init_weights={exported}", "data.sources.ours.val=shards/ours"]
    run("launch/finetune.py", "--recipe", "pooled_focal", *SMALL, *SHORT, *QUIET, *words, "input.stride=1",
        "evaluate.workers=0", root=checkout)  # fmt: skip
    folder = checkout / "runs/pooled_focal"
    assert len(steps_of(folder)) == 4
    (scores,) = folder.glob("predictions/*/scores.json")
    assert json.loads(scores.read_text())["videos"] == 8
