"""What extending costs, by doing it: docs/extending.md's files in a copy of the checkout, then packed, then trained."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from pretrain.recipe.files import RECIPES
from tests.toy_shards import encoded

ROOT = RECIPES.parent


def write_clip(path: Path, brightness: int) -> None:
    """A bright square that moves down over 24 frames of 96 x 96 pixels."""
    frames = [np.full((96, 96, 3), brightness, np.uint8) for _ in range(24)]
    for t, frame in enumerate(frames):
        frame[2 * t : 2 * t + 24, 30:60] = 230
    path.write_bytes(encoded(frames, rate=24))


def run(*command: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TUBELET_DATA": str(root / "shards")}
    result = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_new_method_backbone_and_data_set_train(tmp_path: Path) -> None:
    for package in ("pretrain", "finetune", "launch", "recipes"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    page = (ROOT / "docs/extending.md").read_text()
    for path, text in re.findall(r"^```\w+\n# ((?:pretrain|recipes)/\S+)\n(.*?)^```$", page, re.M | re.S):
        assert not (tmp_path / path).exists(), "an extension replaces nothing"
        (tmp_path / path).write_text(text)
    (tmp_path / "videos").mkdir()
    for number in range(8):
        write_clip(tmp_path / "videos" / f"{number}.mp4", 20 * number)

    run("launch/pack.py", "videos", "shards/ours", "--short-side", "80", "--workers", "0", root=tmp_path)
    small = ["data.workers=0", "data.lanes=2", "data.shuffle_window=4", "batch.samples=4", "batch.micro=2"]
    short = ["schedule.epochs=2", "schedule.warmup_epochs=0", "optim.base_lr=0.1", "log.peak_tflops=1"]
    quiet = ["log.wandb=disabled", "log.pictures_every_steps=0", "compute.dtype=fp32"]
    run("launch/pretrain.py", "--recipe", "pooled_motion", *small, *short, *quiet, root=tmp_path)

    folder = tmp_path / "runs/pooled_motion"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    assert any("motion" in key for key in steps[0]), "a method's own metrics are logged"
    assert list((folder / "checkpoints").glob("step_*/manifest.json"))
