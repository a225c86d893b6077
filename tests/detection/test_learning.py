"""Detectors learn what they are for: the statements of bench/detection_learning.py, each some minutes of training."""

from pathlib import Path
from typing import Any

import pytest

from bench.detection_learning import RUNS, make_shards, train
from pretrain.commands import camera_clips

pytestmark = [pytest.mark.faults, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("camera")
    camera_clips.fetch(folder)
    return folder


def learned(kind: str, folder: Path, camera: Path) -> dict[str, dict[str, Any]]:
    shards = make_shards(kind, folder, camera)
    return {run.name: train(run, shards, folder / run.name) for run in RUNS[kind] if not run.name.endswith("long")}


def test_evad_finds_persons_and_tells_what_they_do_with_fewer_tokens_too(tmp_path: Path, camera: Path) -> None:
    runs = learned("alone", tmp_path, camera)
    assert runs["evad_0.7"]["mAP"] > 80
    assert runs["evad_0.7"]["mAP"] > runs["evad_unpruned"]["mAP"] - 2


def test_cycleacr_tells_what_depends_on_another_person(tmp_path: Path, camera: Path) -> None:
    runs = learned("others", tmp_path, camera)
    same = {name: [one["classes"][label] for label in ("together", "apart")] for name, one in runs.items()}
    assert min(same["cycleacr"]) > 85
    assert min(same["cycleacr"]) > max(same["plain"]) + 5


def test_the_memory_tells_what_was_done_20_seconds_ago(tmp_path: Path, camera: Path) -> None:
    runs = learned("before", tmp_path, camera)
    past = {
        name: [value for label, value in one["classes"].items() if label.endswith("before")]
        for name, one in runs.items()
    }
    # Drawn anew each second: a third of the keyframes have one of the labels, and who does not remember can but guess.
    assert max(past["cycleacr_now"]) < 50
    assert min(past["cycleacr_memory"]) > 90
