"""launch/predict.py on real video with people: persons are found, followed, judged, and drawn; two kinds of model."""

import csv
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from finetune.commands import predict
from finetune.recipe import load_tune_recipe
from pretrain.data.boxes.action_list import make_action_list
from pretrain.objectives.base import method_of

PEDESTRIANS = Path(__file__).parents[1] / "assets" / "pedestrians.mp4"
#: From 0 on, as YOWO's have it: the table must hold the annotation's ids, not the outputs' places.
NAMES = {0: "walk", 1: "stand", 2: "talk"}
COMMON = """\
input: {frames: 4, stride: 2, short_side: 64, pad: 32, max_boxes: 10}
data: {sources: {toy: {shards: FOLDER}}, workers: 0}
batch: {samples: 2, micro: 2}
"""
RECIPES = {
    "detection": COMMON
    + """\
model: {name: classifier, size: custom, patch_size: 16, dim: 32, depth: 1, heads: 2, mlp_ratio: 2, classes: 3,
        pooling: token0, head_init_scale: 1, pretrain_frames: 4, pretrain_height: 64, pretrain_width: 64}
objective: {name: detection, pixels: imagenet}
""",
    "evad": COMMON
    + """\
model: {name: evad, size: custom, patch_size: 16, dim: 32, depth: 4, heads: 2, mlp_ratio: 2, classes: 3, drop_path: 0,
        pretrain_side: 64, keep_rate: 0.8, queries: 10, rcnn_heads: 1, query_dim: 24, query_heads: 2, query_hidden: 48,
        dynamic_dim: 8, pool_size: 3, action_pool_size: 3, decoder_dim: 24, decoder_depth: 1, decoder_heads: 2,
        decoder_drop_path: 0, action_hidden: 32}
objective: {name: evad, person_threshold: THRESHOLD}
""",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Exports of models with random weights, and their class names, by task."""

    def write(task: str, threshold: float = 0.0) -> Path:
        folder = tmp_path_factory.mktemp(task)
        (folder / "classes.json").write_bytes(make_action_list("test", NAMES).to_json())
        text = RECIPES[task].replace("FOLDER", str(folder)).replace("THRESHOLD", str(threshold))
        (folder / "toy.yaml").write_text(text)
        recipe = load_tune_recipe(str(folder / "toy.yaml"))
        torch.manual_seed(0)
        method = method_of(recipe)
        method.exports(folder)["safetensors"].write(method.build(), str(folder / "weights"))
        (folder / "weights" / "classes.json").write_bytes((folder / "classes.json").read_bytes())
        return folder / "weights"

    return write


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_who_does_what_when_on_real_video(weights: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(PEDESTRIANS), "--weights", str(weights("detection")), "--every", "2", "--top", "2"]
    out, table = tmp_path / "seen.mp4", tmp_path / "seen.csv"
    assert predict.main([*words, "--out", str(out), "--csv", str(table), "--person-score", "0.8"]) == 0
    printed = capsys.readouterr().out
    assert "3 keyframes" in printed and f"video: {out}" in printed and f"table: {table}" in printed
    assert "1.00 s  person 1: " in printed and any(name in printed for name in NAMES.values())
    rows = rows_of(table)
    assert len(rows) % 3 == 0 and len(rows) >= 9, "three actions of each person"
    assert {row[6] for row in rows} == {"0", "1", "2"}
    assert {row[0] for row in rows} == {"pedestrians"} and {float(row[1]) for row in rows} == {1.0, 3.0, 5.0}
    shares = np.array([[float(value) for value in row[2:6]] for row in rows])
    assert (shares >= 0).all() and (shares <= 1).all() and (shares[:, :2] < shares[:, 2:]).all()
    with av.open(str(out)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 60


def test_a_model_that_finds_persons_needs_no_detector(
    weights: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = weights("evad")
    words = [str(PEDESTRIANS), "--weights", str(folder), "--every", "3", "--out", str(tmp_path / "seen.mp4")]
    assert predict.main([*words, "--csv", str(tmp_path / "seen.csv")]) == 0
    assert len(rows_of(tmp_path / "seen.csv")) == 2 * 10 * 3, "at a threshold of 0 every proposal is a person"
    capsys.readouterr()
    assert predict.main([*words, "--persons", "hog"]) == 2
    assert "--persons: without a meaning for the task evad; allowed with it: --csv" in capsys.readouterr().err


def test_a_keyframe_without_persons_stays_empty(
    weights: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(PEDESTRIANS), "--weights", str(weights("evad", 1.0)), "--every", "3"]
    assert predict.main([*words, "--out", str(tmp_path / "seen.mp4"), "--csv", str(tmp_path / "seen.csv")]) == 0
    assert rows_of(tmp_path / "seen.csv") == [] and "2 keyframes, 0 persons, 60 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, told",
    [
        (["--every", "0"], "--every: found 0, allowed: more than 0 seconds"),
        (["--every", "inf"], "--every: found inf, allowed: more than 0 seconds"),
        (["--person-score", "70"], "--person-score: found 70, allowed: from 0 to 1"),
        (["--persons", "nobody"], "person detector: found 'nobody', allowed: hog"),
        (["--clips", "3"], "--clips: without a meaning for the task detection"),
    ],
)
def test_what_can_not_be_asked(weights: Any, capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert predict.main([str(PEDESTRIANS), "--weights", str(weights("detection")), *words]) == 2
    assert told in capsys.readouterr().err
