"""Segmentation by free text: windows, blend, background, the sets' protocols, pictures and films, bad questions."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.commands.segment import main
from finetune.open_vocabulary.protocols import PROTOCOLS
from finetune.open_vocabulary.text_masks import blended_masks, labels_of, sliding_masks, windows
from finetune.open_vocabulary.text_segmenter import SegmenterOptions, open_segmenter
from pretrain.objectives.base import method_of
from pretrain.recipe.load import load_recipe
from tests.captioned_pictures import SHAPES, drawn, world
from tests.toy_shards import encoded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, and the weights of a projector that is not where it began."""
    where = world(tmp_path_factory)
    if not (where / "weights").exists():
        recipe = load_recipe(str(where / "tagalign.yaml"))
        torch.manual_seed(3)
        objective: Any = method_of(recipe).build()
        with torch.no_grad():
            for value in objective.parameters():
                value.add_(torch.randn_like(value) * 0.2)
        method_of(recipe).exports(where)["safetensors"].write(objective, str(where / "weights"))
    return where


def test_windows_end_at_the_edge() -> None:
    assert windows(448, 448, 224) == [0] and windows(300, 448, 224) == [0]
    assert windows(449, 448, 224) == [0, 1] and windows(672, 448, 224) == [0, 224]
    assert windows(1000, 448, 224) == [0, 224, 448, 552]


def test_masks_are_averaged_where_windows_overlap(folder: Path) -> None:
    """Masks, behind the sigmoid, and not cosines; of sizes that no window fits."""
    segmenter = open_segmenter(str(folder / "weights"), CPU, SegmenterOptions())
    tower, projector = segmenter._objective.images.module(), segmenter._objective.model
    classes = segmenter.classes(["square", "a red circle"])
    image = torch.randn(3, 40, 56)
    found = sliding_masks(tower, projector, image, classes, 0.3, 40, 16)
    left, right = (blended_masks(tower, projector, image[None, :, :, x : x + 40], classes, 0.3)[0] for x in (0, 16))
    torch.testing.assert_close(found[:, :, :16], left[:, :, :16])
    torch.testing.assert_close(found[:, :, 16:40], (left[:, :, 16:] + right[:, :, :24]) / 2)
    assert not torch.allclose(left[:, :, 16:], right[:, :, :24], atol=1e-3), "or nothing was averaged"
    whole = sliding_masks(tower, projector, image, classes, 0.3, 99, 16)
    assert torch.equal(whole, blended_masks(tower, projector, image[None], classes, 0.3)[0])


def test_a_blend_of_one_is_clip_alone(folder: Path) -> None:
    segmenter = open_segmenter(str(folder / "weights"), CPU, SegmenterOptions())
    tower, projector = segmenter._objective.images.module(), segmenter._objective.model
    classes, image = segmenter.classes(["square", "bar"]), torch.randn(1, 3, 32, 48)
    alone, mixed, own = (blended_masks(tower, projector, image, classes, blend) for blend in (1.0, 0.25, 0.0))
    torch.testing.assert_close(mixed, 0.25 * alone + 0.75 * own)
    with torch.no_grad():
        projector.head.weight.zero_()
    assert torch.equal(blended_masks(tower, projector, image, classes, 1.0), alone)


def test_background_stands_in_front_and_wins_ties() -> None:
    masks = torch.tensor([[[0.4, 0.5]], [[0.3, 0.6]]])
    assert labels_of(masks, 1, 2, None).tolist() == [[0, 1]]
    assert labels_of(masks, 1, 2, 0.4).tolist() == [[0, 2]]
    assert labels_of(masks, 3, 4, 0.55).unique().tolist() == [0, 2]


def test_the_eleven_sets() -> None:
    """Classes and backgrounds as published (systems/tagalign.md, section 7)."""
    published = {"voc": 21, "context": 60, "coco_object": 81, "imagenets50": 51, "imagenets300": 301,
                 "imagenets919": 920, "voc20": 20, "context59": 59, "coco_stuff": 171, "cityscapes": 19,
                 "ade20k": 150}  # fmt: skip
    assert {key: one.count + one.background for key, one in PROTOCOLS.items()} == published
    for one in PROTOCOLS.values():
        assert one.names is None or len(set(one.names)) == one.count == len(one.names)
        assert one.first_class == 0 or not one.background


def test_a_set_is_judged_as_its_pixels_say(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of all pixels of all pictures together, at the masks' size; a value that counts nowhere does not."""
    (tmp_path / "names.txt").write_text("\n".join(SHAPES) + "\n")
    words = [str(folder / "shards"), "--weights", str(folder / "weights"), "--set", "own"]
    words += ["--class-names", str(tmp_path / "names.txt"), "--first-class", "1", "--ignored", "2"]
    assert main([*words, "--out", str(tmp_path / "scores")]) == 0
    shown = capsys.readouterr().out
    segmenter = open_segmenter(str(folder / "weights"), CPU, SegmenterOptions())
    classes = segmenter.classes(SHAPES)
    truth, found = [], []
    for number in [one for one in range(28) if one != 24]:  # the picture with an empty caption was not packed
        pixels, mask, _ = drawn(number)
        labels = segmenter.labels(pixels, classes, None).numpy()
        kept = (mask != 0) & (mask != 2)
        truth.append(mask[kept].astype(int) - 1)
        found.append(labels[kept])
    truths, answers = np.concatenate(truth), np.concatenate(found)
    overlaps = [
        ((truths == k) & (answers == k)).sum() / ((truths == k) | (answers == k)).sum()
        for k in range(3)
        if ((truths == k) | (answers == k)).any()
    ]
    assert f"{100 * np.mean(overlaps):6.2f}  mIoU, %" in shown and "27 pictures, 3 classes" in shown
    assert '"square",' in (tmp_path / "scores" / "per_class.csv").read_text()


def test_a_picture_and_a_film(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import av

    ask = ["--weights", str(folder / "weights"), "--query", "a red square;red bar", "--query", "ground"]
    out = tmp_path / "made" / "queries.png"
    assert main([str(folder / "pictures" / "003.png"), *ask, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    shares = [float(line.split()[0]) for line in shown.splitlines() if " %  " in line]
    assert sum(shares) == pytest.approx(100, abs=0.2) and "a red square;red bar" in shown
    with Image.open(out) as sheet:
        assert sheet.height > 4 * 48
    assert main([str(folder / "pictures" / "003.png"), *ask, "--background", "1", "--out", str(out)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["0.0", "0.0"]
    film = tmp_path / "film.mp4"
    film.write_bytes(encoded((drawn(number // 6)[0] for number in range(24)), rate=12))
    assert main([str(film), *ask, "--fps", "4", "--out", str(tmp_path / "film.png")]) == 0
    with av.open(str(tmp_path / "film.mp4")) as same:
        assert same.streams.video[0].frames in (24, 8)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ([], 1, "no query"),
        (["--query", "a " * 30], 1, "text_too_long"),
        (["--query", " ; "], 1, "an empty class name"),
        (["--query", "a", "--query", "a"], 2, "asked twice"),
        (["--query", "a", "--blend", "1.5"], 2, "--blend 1.5"),
        (["--query", "a", "--background", "nan"], 2, "--background nan: allowed: from 0 to 1"),
        (["--query", "a", "--stride", "0"], 2, "--stride 0: allowed"),
        (["--query", "a", "--fps", "0"], 2, "--fps 0"),
        (["--query", "a", "--window", "32", "--stride", "33"], 2, "--stride 33: allowed"),
        (["--query", "a", "--window", "4"], 2, "at least a patch of 8 pixels"),
        (["--query", "a", "--template", "photo"], 1, "has no {}"),
        (["--set", "own"], 2, "needs --class-names FILE"),
        (["--set", "imagenets50"], 2, "needs --class-names FILE with 50 names"),
        (["--set", "voc", "--query", "cat"], 2, "--query"),
        (["--set", "voc", "--class-names", "NAMES"], 1, "2 class names, allowed: 20"),
        (["--set", "voc", "--class-names", "nowhere.txt"], 1, "--class-names nowhere.txt"),
    ],
)
def test_bad_questions_are_told(
    folder: Path, tmp_path: Path, words: list[str], code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    given = [str(tmp_path / "names.txt") if word == "NAMES" else word for word in words]
    assert main([str(folder / "pictures" / "003.png"), "--weights", str(folder / "weights"), *given]) == code
    assert expected in capsys.readouterr().err


def test_a_tower_that_is_gone_and_a_file_that_is_no_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "weights", tmp_path / "weights")
    recipe = tmp_path / "weights" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("clip.safetensors", "gone.safetensors"))
    ask = [str(folder / "pictures" / "003.png"), "--query", "a", "--weights"]
    assert main([*ask, str(tmp_path / "weights")]) == 1
    assert "objective.towers.weights=" in (told := capsys.readouterr().err) and "gone.safetensors" in told
    assert main([str(folder / "tokenizer.json"), "--query", "a", "--weights", str(folder / "weights")]) == 1
    assert "allowed: a picture or a video" in capsys.readouterr().err
