"""Fine-tuning on the videos of an official list where they lie, without copying them into shards."""

from pathlib import Path
from typing import Any

import pytest

from finetune.classification.predictions import read_predictions
from pretrain.commands.pack import main as pack
from tests.finetune.conftest import CLASSES, video


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv and val.csv of `PATH CLASS` lines over a folder of videos."""
    folder = tmp_path_factory.mktemp("in place")
    for split, count, first in (("train", 24, 0), ("val", 11, 100)):
        lines = []
        for number in range(count):
            path = folder / f"{split}_{number:02d}.mp4"
            path.write_bytes(video(first + number, CLASSES[number % 3]))
            lines.append(f"{path.name} {number % 3}\n")
        (folder / f"{split}.csv").write_text("".join(lines))
    return folder


def test_a_run_on_videos_in_place_is_the_run_on_packed_ones(toy: Any, lists: Path) -> None:
    for name, way in (("in place", "--in-place"), ("packed", "--copy")):
        words = []
        for split, key in (("train", "shards"), ("val", "val")):
            target = str(lists / f"{name} {split}")
            assert pack([way, "--order", "given", str(lists / f"{split}.csv"), target, "--workers", "0"]) == 0
            words.append(f"data.sources.toy.{key}={target}")
        toy.run(name, *words)
    assert toy.records("in place")[0]["train/loss"] > 0
    for key in ("train/loss", "eval/top1"):
        assert [r.get(key) for r in toy.records("in place")] == [r.get(key) for r in toy.records("packed")]
    tested = [next((toy.folder / name / "predictions").iterdir()) for name in ("in place", "packed")]
    here, there = (read_predictions(folder) for folder in tested)
    assert here.logits.shape == (11, 6, 3) and (here.logits == there.logits).all()
