"""Segmentation: heads, backbones of every kind, windows, and a run as a user starts it."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.commands.predict import main as predict_main
from finetune.recipe import load_tune_recipe
from finetune.segmentation.judged_pictures import JudgedPictures, save_examples
from finetune.segmentation.mask_classes import class_colours, painted
from finetune.segmentation.mask_heads import LinearMaskHead, UperNetHead, head_cost
from finetune.segmentation.mask_objective import pixel_loss, windows
from pretrain.commands.pack import main as pack
from pretrain.errors import DataError
from pretrain.metrics.segmentation import NO_CLASS
from pretrain.models.base import MapLevel
from pretrain.objectives.base import method_of, problems_of
from pretrain.runtime.vision_ops import ensure_torchvision
from tests.finetune.conftest import Toy

LEVELS = [MapLevel(channels, stride) for channels, stride in ((8, 4), (12, 8), (16, 16), (20, 32))]
CLASSES = 4
NAMES = ["ground", "red", "green", "blue"]

RECIPE = """\
model: {name: groupmixformer, size: custom, dims: [20, 20, 30, 30], depths: [1, 1, 1, 1], mlp_ratios: [2, 2, 2, 2],
        classes: 4, drop_path: 0.1}
objective: {name: segmentation, channels: 16}
input: {short_side: 48, crop_size: 32, scale: [0.8, 1.2], colour: none, first_class: 1}
data:
  sources: {toy: {shards: FOLDER/train, val: FOLDER/val, labels: FOLDER/classes.txt}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {base_lr: 0.1, base_min_lr: 0.001, layer_decay: 1, weight_decay: 0}
schedule: {epochs: 6, warmup_epochs: 0.5}
evaluate: {every_epochs: 3, workers: 0, pictures: 3}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 9, keep_last: 1}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""
VIT = "{name: image_vit, image_size: 32, patch_size: 8, dim: 24, depth: 2, heads: 2, classes: 4}"
VIDEO = """{name: classifier, size: custom, patch_size: 8, dim: 24, depth: 2, heads: 2, mlp_ratio: 2, classes: 4,
        pooling: token0, pretrain_frames: 4, pretrain_height: 32, pretrain_width: 32}"""
LOOKS = """{name: sparseformer, size: custom, form: v1, tokens: 5, focus_dim: 64, dim: 64, depth: 1, repeats: 1,
        points: 4, channels: 8, classes: 4}"""
BACKBONES = {"groupmixformer": (None, 1), "image_vit": (VIT, 1), "classifier": (VIDEO, 2), "sparseformer": (LOOKS, 1)}


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey ground with a red, a green and a blue box on it, and the mask of classes 1 to 4; 0 is of no class."""
    rng = np.random.default_rng(number)
    height, width = int(rng.integers(40, 60)), int(rng.integers(40, 70))
    picture, mask = np.full((height, width, 3), 90, np.uint8), np.ones((height, width), np.uint8)
    for colour in range(3):
        y, x = int(rng.integers(height - 16)), int(rng.integers(width - 16))
        picture[y : y + 16, x : x + 16] = 20
        picture[y : y + 16, x : x + 16, colour] = 230
        mask[y : y + 16, x : x + 16] = colour + 2
    mask[0] = 0
    return (picture + rng.integers(0, 10, picture.shape)).astype(np.uint8), mask


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Pictures and masks in folders beside one another, packed as ADE20K is."""
    folder = tmp_path_factory.mktemp("segmentation")
    for split, numbers in (("train", range(24)), ("val", range(100, 105))):
        for number in numbers:
            for kind, pixels in zip(("images", "annotations"), scene(number), strict=True):
                path = folder / kind / split / f"{number:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
        asked = f"mask.png={folder / 'annotations' / split}"
        words = ["--kind", "image", "--with", asked, "--no-labels", "--workers", "0"]
        assert pack([str(folder / "images" / split), str(folder / split), *words]) == 0
    (folder / "classes.txt").write_text("\n".join(NAMES))
    recipe = folder / "toy.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return Toy(recipe, folder)


@pytest.fixture(scope="module")
def trained(scenes: Toy) -> Path:
    """The folder of an uninterrupted run with averaged weights."""
    scenes.run("trained", "ema.decay=0.5")
    return scenes.folder / "trained"


def test_run_from_start_to_test(scenes: Toy, trained: Path) -> None:
    """Colours are learned in a few steps; a step is judged while training and by the test alike."""
    judged = {record["step"]: record for record in scenes.records("trained") if "eval/mIoU" in record}
    assert sorted(judged) == [9, 18] and all(record["eval/pictures"] == 5 for record in judged.values())
    best = json.loads((trained / "best.json").read_text())
    assert best["metric"] == "mIoU" and best["value"] == max(record["eval/mIoU"] for record in judged.values())
    folder = trained / "predictions" / "step_00000018"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["mIoU"] == judged[18]["eval/mIoU"] > 30 and scores["pixel_accuracy"] > 60
    with (folder / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    labelled = [(mask == number + 1).sum() for number in range(CLASSES) for mask in [masks(range(100, 105))]]
    assert [row["class"] for row in rows] == NAMES and [int(row["pixels"]) for row in rows] == labelled
    mean = np.mean([float(row["iou"]) for row in rows])
    assert mean == pytest.approx(scores["mIoU"], abs=0.01)
    with Image.open(folder / "examples.png") as sheet:
        assert sheet.width > 3 * 48


def masks(numbers: range) -> np.ndarray:
    return np.concatenate([scene(number)[1].flatten() for number in numbers])


def test_a_picture_is_answered(scenes: Toy, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = scenes.folder / "images/val/100.png", tmp_path / "out.png"
    assert predict_main([str(picture), "--weights", str(trained), "--out", str(out), "--top", "2"]) == 0
    # DeepSpeed, where this test is the first to import it, tells its accelerator here.
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]
    assert re.match(r" *\d+\.\d %  ground", lines[0]) and len(lines) == 4
    with Image.open(out) as drawn, Image.open(tmp_path / "out_mask.png") as found, Image.open(picture) as shown:
        assert drawn.size == found.size == shown.size and found.mode == "L"
        share = (np.array(found) == 0).mean()
    assert float(lines[0].split()[0]) == pytest.approx(100 * share, abs=0.06)
    assert predict_main([str(scenes.recipe), "--weights", str(trained)]) == 1
    assert "segmentation looks at pictures" in capsys.readouterr().err


def objective_of(scenes: Toy, backbone: str, *overrides: str) -> Any:
    section, frames = BACKBONES[backbone]
    path = scenes.folder / f"{backbone}.yaml"
    text = scenes.recipe.read_text()
    if section is not None:
        text = re.sub(r"^model:.*?(?=^objective)", f"model: {section}\n", text, flags=re.M | re.S)
    path.write_text(text)
    method = method_of(load_tune_recipe(str(path), [f"input.frames={frames}", *overrides]))
    assert problems_of(method) == []
    torch.manual_seed(0)
    return method, method.build()


@pytest.mark.parametrize(("way", "crosses"), [("all_ranks", True), ("rank", False), ("frozen", True)])
def test_statistics_of_the_head_are_its_own(scenes: Toy, way: str, crosses: bool) -> None:
    """A backbone's frozen ones were loaded; a new head's are those of no picture, and have to be learned."""
    method, objective = objective_of(scenes, "groupmixformer", f"model.batch_norm={way}")
    assert objective.cross_rank_batch_norm is crosses
    before = {name: one.clone() for name, one in objective.named_buffers() if name.endswith("running_mean")}
    objective.train()(method.example(2))
    moved = {name for name, one in objective.named_buffers() if name in before and not torch.equal(one, before[name])}
    backbone = {name for name in before if not name.startswith(("model.head.", "model.norm4."))}
    assert moved & backbone == (set() if way == "frozen" else backbone)
    assert {name for name in before if name.startswith("model.head.")} <= moved


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_with_every_head(scenes: Toy, backbone: str, head: str) -> None:
    """A step reaches every trained parameter, and pictures of any size are answered."""
    method, objective = objective_of(scenes, backbone, f"objective.head={head}")
    objective.train()(method.example(2)).loss.backward()
    without = {name for name, one in objective.named_parameters() if one.requires_grad and one.grad is None}
    assert not without
    frozen = {name for name, one in objective.named_parameters() if not one.requires_grad}
    assert frozen == ({"model.norm4.weight", "model.norm4.bias"} if backbone == "groupmixformer" else set())
    assert objective.cross_rank_batch_norm and method.cost().macs["mask head"] > 0 and "head" not in method.cost().macs
    video = torch.randint(256, (1, 1, 43, 57, 3), dtype=torch.uint8)
    found = objective.eval().segment(video, 61, 50)
    assert found.shape == (1, 61, 50) and 0 <= int(found.min()) <= int(found.max()) < CLASSES
    last = method.architecture.layer_of("head.classifier.weight")
    assert last[0] == last[1]


def test_windows_are_averaged_where_they_overlap(scenes: Toy) -> None:
    """Of a picture of one window's size both ways are the same; of a larger one windows meet all pixels."""
    _, whole = objective_of(scenes, "groupmixformer")
    _, slid = objective_of(scenes, "groupmixformer", "objective.judge=slide", "objective.stride=20")
    video = torch.randint(256, (1, 1, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(whole.eval().segment(video, 32, 32), slid.eval().segment(video, 32, 32))
    for height, width in ((32, 32), (33, 71), (20, 90)):
        seen, sizes = np.zeros((height, width), int), set()
        for rows, columns in windows(height, width, 32, 20):
            seen[rows, columns] += 1
            sizes.add(seen[rows, columns].shape)
        assert seen.min() >= 1 and sizes == {(min(height, 32), 32)}
    assert list(windows(32, 52, 32, 20)) == [(slice(0, 32), slice(0, 32)), (slice(0, 32), slice(20, 52))]


def test_scores_that_are_not_finite_are_no_class(scenes: Toy) -> None:
    _, objective = objective_of(scenes, "groupmixformer")
    nn.init.constant_(objective.model.head.classifier.bias, float("nan"))
    found = objective.eval().segment(torch.zeros(1, 1, 32, 32, 3, dtype=torch.uint8), 32, 32)
    assert (found == NO_CLASS).all()


def test_pixels_of_no_class_count_nowhere() -> None:
    scores, labels = torch.randn(2, CLASSES, 8, 8), torch.randint(CLASSES, (2, 16, 16))
    labels[:, :8] = NO_CLASS
    loss, full = pixel_loss(scores, labels)
    expected = nn.functional.cross_entropy(full[:, :, 8:], labels[:, 8:])
    torch.testing.assert_close(loss, expected)
    assert float(pixel_loss(scores, torch.full_like(labels, NO_CLASS))[0]) == 0


def test_starts_take_the_backbone_and_a_head_that_fits(scenes: Toy, trained: Path, tmp_path: Path) -> None:
    _, other = objective_of(scenes, "groupmixformer")
    state = {name: value + 1 for name, value in other.model.state_dict().items() if value.is_floating_point()}
    counts = {name: value for name, value in other.model.state_dict().items() if not value.is_floating_point()}
    for changed, taken in (((), True), (("objective.channels=8",), False)):
        _, objective = objective_of(scenes, "groupmixformer", *changed)
        before = objective.model.head.classifier.bias.clone()
        objective.load_pretrained("file", state | counts)
        assert torch.equal(objective.model.conv_stem.proj1.bias, state["conv_stem.proj1.bias"])
        assert not objective.model.norm4.weight.requires_grad and objective.model.head.classifier.weight.requires_grad
        expected = state["head.classifier.bias"] if taken else before
        assert torch.equal(objective.model.head.classifier.bias, expected)


def hugging_face_name(name: str) -> str:
    """Say what transformers calls a parameter of the head."""
    name = re.sub(r"^pooling\.stages\.(\d)\.", r"psp_modules.\1.1.", name)
    return name.removeprefix("pooling.").replace(".norm.", ".batch_norm.")


def test_upernet_is_that_of_transformers() -> None:
    ensure_torchvision()  # which transformers imports
    modeling = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import UperNetConfig

    torch.manual_seed(0)
    ours = UperNetHead(LEVELS, CLASSES, 24, auxiliary=False).eval()
    for name, value in ours.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.1 if name.endswith("var") else -0.5, 0.5)
    config = UperNetConfig(hidden_size=24, num_labels=CLASSES)
    theirs = modeling.UperNetHead(config, [level.channels for level in LEVELS]).eval()
    theirs.load_state_dict({hugging_face_name(name): value for name, value in ours.state_dict().items()})
    maps = [torch.randn(2, level.channels, -(-70 // level.stride), -(-90 // level.stride)) for level in LEVELS]
    with torch.no_grad():
        torch.testing.assert_close(ours(maps)[0], theirs(maps), rtol=1e-4, atol=1e-5)


def test_heads_give_scores_at_the_finest_map() -> None:
    maps: list[Tensor] = [torch.randn(2, level.channels, 96 // level.stride, 64 // level.stride) for level in LEVELS]
    for head in (LinearMaskHead(LEVELS, CLASSES), UperNetHead(LEVELS, CLASSES, 8, auxiliary=True)):
        assert head.train()(maps)[0].shape == (2, CLASSES, 24, 16)
        assert head.eval()(maps)[1] is None
    aside = UperNetHead(LEVELS, CLASSES, 8, auxiliary=True).train()(maps)[1]
    assert aside is not None and aside.shape == (2, CLASSES, 6, 4)
    (single,) = UperNetHead(LEVELS[2:3], CLASSES, 8, auxiliary=False).eval()(maps[2:3])[:1]
    assert single.shape == (2, CLASSES, 24, 16)
    with torch.device("meta"):
        assert head_cost(LinearMaskHead(LEVELS, CLASSES), LEVELS, 96, 64).published == 24 * 16 * 56 * CLASSES


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("model.classes=1", "model.classes: found 1, allowed: 2 to 32767 classes"),
        ("objective.channels=0", "objective.channels: found 0, allowed: 1 or more"),
        ("objective.auxiliary=-1", "objective.auxiliary: found -1"),
        ("data.sources.toy.sampling=sparse", "data.sources.toy.sampling: has no effect with objective.name="),
        ("evaluate.clips=2", "evaluate.clips: has no effect with objective.name=segmentation"),
        ("objective={judge: slide, stride: 50}", "objective.stride: found 50, allowed: 1 to input.crop_size=32"),
    ],
)
def test_what_can_not_work_is_named(scenes: Toy, wrong: str, told: str) -> None:
    words = [wrong] if not wrong.startswith("objective={") else ["objective.judge=slide", "objective.stride=50"]
    found = problems_of(method_of(load_tune_recipe(str(scenes.recipe), words)))
    assert any(line.startswith(told) for line in found), found


def test_backbones_without_a_map_are_refused(scenes: Toy) -> None:
    """A pooled norm, and a video model that takes a picture for several steps of time."""
    for name, wrong, told in (
        ("image_vit", "model.pooling=mean", "model.pooling: this one has an fc_norm"),
        ("classifier", "input.frames=4", "input.frames: found 4, allowed: as many as the model takes in one step"),
    ):
        objective_of(scenes, name)  # writes the file
        words = [f"input.frames={BACKBONES[name][1]}", wrong]
        found = problems_of(method_of(load_tune_recipe(str(scenes.folder / f"{name}.yaml"), words)))
        assert len(found) == 1 and found[0].startswith(told), found


def test_as_many_names_as_classes_are_needed(scenes: Toy, tmp_path: Path) -> None:
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    words = [f"data.sources.toy.labels={tmp_path / 'three.txt'}"]
    with pytest.raises(DataError, match=r"three.txt: 3 class names, model.classes=4"):
        method_of(load_tune_recipe(str(scenes.recipe), words)).samples()


def test_classes_are_painted_over_pictures(tmp_path: Path) -> None:
    picture, labels = np.full((2, 3, 3), 200, np.uint8), np.array([[0, 1, NO_CLASS], [1, 1, 1]])
    colours = class_colours(2)
    over = painted(picture, labels, 2)
    assert np.array_equal(over[0, 0], 100 + colours[0] // 2) and (over[0, 2] == 100).all()
    assert len({tuple(one) for one in class_colours(150).tolist()}) == 150
    small = (picture[:1], labels[:1], labels[:1])
    judged = JudgedPictures(torch.zeros(2, 3), examples=[(picture, labels, labels), small])
    save_examples(judged, 2, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0
