"""launch/video_text.py: features of files and windows, released weights strictly, retrieval, recognition, choices."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from pretrain.commands.video_text import main
from pretrain.models.tvtsv2_weights import write_official
from pretrain.objectives.base import method_of
from pretrain.recipe.load import load_recipe
from tests.narrated_films import COLOURS, RATE, film, make_films, picture
from tests.toy_shards import encoded

ORDER = ("green", "red", "white", "blue")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a recipe, weights in the official layout, and video files, one of them broken."""
    folder = tmp_path_factory.mktemp("video_text")
    make_films(folder)
    torch.manual_seed(1)
    objective = method_of(load_recipe(str(folder / "narrated.yaml"))).build()
    with torch.no_grad():
        for block in objective.model.visual.blocks:
            torch.nn.init.normal_(block.timeattn.qkv.weight, std=0.2)
    write_official(objective.model, str(folder / "weights.pth"))
    (folder / "videos").mkdir()
    for name in ("one", "two"):
        (folder / "videos" / f"{name}.mp4").write_bytes(film(ORDER if name == "one" else ORDER[::-1], 3))
    (folder / "videos" / "broken.mp4").write_bytes(b"no video")
    return folder


def model(place: Path) -> list[str]:
    return [str(place / "weights.pth"), "--recipe", str(place / "narrated.yaml")]


def features_of(place: Path, out: Path, *words: str, expect: int = 0) -> tuple[np.ndarray, list[dict[str, Any]]]:
    assert main(["features", *model(place), "--out", str(out), *words]) == expect
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return safetensors.numpy.load_file(out / "features.safetensors")["features"], rows


def test_features_of_a_list(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "list.txt").write_text("videos/one.mp4\n\nvideos/two.mp4\nvideos/broken.mp4\n")
    listed = ("--list", str(place / "list.txt"))
    assert main(["features", *model(place), "--out", str(tmp_path / "none"), *listed]) == 1
    assert "more than --missing 0.01" in capsys.readouterr().err and not (tmp_path / "none").exists()
    found, rows = features_of(place, tmp_path / "some", *listed, "--missing", "0.5")
    assert "1 of 3 videos left out" in capsys.readouterr().err
    assert found.shape == (2, 24) and [Path(row["path"]).name for row in rows] == ["one.mp4", "two.mp4"]
    unit, _ = features_of(place, tmp_path / "unit", "--videos", str(place / "videos/one.mp4"), "--normalize")
    assert np.linalg.norm(unit[0]) == pytest.approx(1, abs=1e-5)
    assert np.allclose(unit[0], found[0] / np.linalg.norm(found[0]), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-4, "the same colours in another order"


def test_features_are_those_of_the_tower(place: Path, tmp_path: Path) -> None:
    """More frames than the temporal table has rows, squeezed whole and not cropped."""
    from pretrain.trained.video_features import open_model

    still = picture("blue", np.random.default_rng(0), (32, 32))
    (place / "videos" / "still.mp4").write_bytes(encoded([still] * 30, RATE))
    found, _ = features_of(place, tmp_path / "still", "--videos", str(place / "videos/still.mp4"), "--frames", "10")
    objective, _ = open_model(*model(place)[::2])
    from pretrain.data.decoders import open_video

    with open_video((place / "videos/still.mp4").read_bytes(), "pyav") as reader:
        clip = torch.from_numpy(reader.frames([0, 3, 6, 9, 12, 16, 19, 22, 25, 29]))[None]
    with torch.no_grad():
        assert np.allclose(found[0], objective.features({"video": clip})[0].numpy(), atol=1e-5)


def test_windows_cover_a_long_video(place: Path, tmp_path: Path) -> None:
    video = ("--videos", str(place / "videos/one.mp4"))
    found, rows = features_of(place, tmp_path / "w", *video, "--window", "2", "--hop", "1.25", "--frames", "4")
    assert [(row["start"], row["end"]) for row in rows] == [(0, 2), (1.25, 3.25), (2.5, 4.5), (3, 5)]
    assert found.shape == (4, 24) and np.abs(found[0] - found[2]).max() > 1e-4
    whole, rows = features_of(place, tmp_path / "long", *video, "--window", "60")
    assert len(rows) == 1 == len(whole) and rows[0]["end"] == 5
    assert main(["features", *model(place), *video, "--out", str(tmp_path / "x"), "--hop", "1"]) == 2
    assert main(["features", *model(place), *video, "--out", str(tmp_path / "x"), "--window", "0"]) == 2
    assert main(["features", *model(place), "--out", str(tmp_path / "x")]) == 1


def test_retrieval_and_recognition(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrieve", *model(place), str(place / "clips"), "--micro", "8"]) == 0
    assert "t2v_R@1\n" in (shown := capsys.readouterr().out) and "16.00  videos" in shown
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    words = ["recognize", *model(place), str(place / "clips"), "--class-names", str(tmp_path / "names.txt")]
    assert main([*words, "--templates", "a {} square"]) == 0
    assert "100.00  top5" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "none.txt")]) == 1
    assert "class_names" in capsys.readouterr().err


def test_multiple_choice(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"a {colour} square" for colour in COLOURS]
    questions = [{"clip_name": name, "options": options, "answer": answer}
                 for name in ("one", "two.mp4") for answer in (*range(4), options[2])]  # fmt: skip
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    words = ["choose", *model(place), str(tmp_path / "q.jsonl"), str(place / "videos")]
    assert main(words) == 0
    # Each video has one answer, so that of four questions with another right one exactly one is right.
    shown = float(capsys.readouterr().out.split()[0])
    assert shown in (20, 30, 40)
    (tmp_path / "q.jsonl").write_text(json.dumps({"clip_name": "gone", "options": options, "answer": 0}))
    assert main(words) == 1 and "1 of 1 videos left out" in capsys.readouterr().err
    for wrong in ({"clip_name": "one", "options": options, "answer": 4}, {"options": options}, [1]):
        (tmp_path / "q.jsonl").write_text(json.dumps(wrong))
        assert main(words) == 1 and "q.jsonl:1" in capsys.readouterr().err


def test_weights_of_another_size_and_a_missing_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deeper = (place / "narrated.yaml").read_text().replace("depth: 2, heads: 2", "depth: 3, heads: 2")
    (place / "other.yaml").write_text(deeper)
    rest = ["--videos", "x.mp4", "--out", "x", "--recipe"]
    assert main(["features", str(place / "weights.pth"), *rest, str(place / "other.yaml")]) == 1
    assert "missing: visual.blocks.2.norm1.weight" in capsys.readouterr().err
    assert main(["features", str(place / "gone.pth"), *rest, str(place / "narrated.yaml")]) == 1
    assert "no such file" in capsys.readouterr().err
