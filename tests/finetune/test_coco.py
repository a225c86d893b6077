"""Detection and instance segmentation: torchvision's own Mask R-CNN, every kind of backbone, a run from its start."""

import csv
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.coco.category_names import categories_of, coco_categories, read_categories
from finetune.coco.feature_pyramids import JoinedPyramid, SimplePyramid, pyramid_problems
from finetune.coco.instance_objective import FoundObjects, spread_bits, targets_of
from finetune.coco.judged_instances import judged_picture, result_rows
from finetune.coco.mask_rcnn import PositionSampler
from finetune.commands.export import main as export
from finetune.commands.finetune import main as finetune_main
from finetune.commands.predict import main as predict_main
from finetune.recipe import load_tune_recipe
from pretrain.commands.pack import main as pack
from pretrain.data.held_out import HeldOutSamples, HeldOutSet, RowsWithoutChance
from pretrain.data.index import load_index
from pretrain.data.instance_masks import mask_of
from pretrain.errors import DataError
from pretrain.metrics.coco_scores import PictureMatches, coco_scores
from pretrain.models.base import MapLevel
from pretrain.models.dropout import ROW_KEYS, with_row_keys
from pretrain.objectives.base import method_of, problems_of
from pretrain.samples.instance_geometry import packed_masks, unpacked_masks
from tests.finetune.coco_scenes import write_scenes
from tests.finetune.conftest import Toy

RECIPE = """\
model: {name: groupmixformer, size: custom, dims: [20, 20, 30, 30], depths: [1, 1, 1, 1], mlp_ratios: [2, 2, 2, 2],
        classes: 3, drop_path: 0.1}
objective: {name: coco, channels: 16, anchor: 8, boxes: 32, box_channels: 32, mask_channels: 8, most: 10}
input: {short_side: 64, long_side: 96, train_sides: [56, 64]}
data:
  sources: {toy: {shards: FOLDER/shards/train, val: FOLDER/shards/val, labels: FOLDER/instances_train.json}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {scaled: none, base_lr: 4e-3, base_min_lr: 0.0, layer_decay: 1, weight_decay: 0.05}
schedule: {epochs: 2, warmup_epochs: 0.5}
evaluate: {every_epochs: 1, workers: 0, pictures: 3}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 100, keep_last: 1}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""
VIT = "{name: image_vit, image_size: 64, patch_size: 16, dim: 24, depth: 2, heads: 2, classes: 3}"
VIDEO = """{name: classifier, size: custom, patch_size: 16, dim: 24, depth: 2, heads: 2, mlp_ratio: 2, classes: 3,
        pooling: token0, pretrain_frames: 4, pretrain_height: 32, pretrain_width: 32}"""
BACKBONES = {"groupmixformer": (None, 1), "image_vit": (VIT, 1), "classifier": (VIDEO, 2)}
#: Published in COCO as well: a box without width, and one whose polygon lies outside of its picture.
ODD = {2: [{"category_id": 7, "iscrowd": 0, "bbox": [9.5, 8, 0, 6], "area": 3.0,
            "segmentation": [[9.5, 8, 9.5, 14, 9.5, 11]]},
           {"category_id": 2, "iscrowd": 0, "bbox": [300, 300, 20, 20], "area": 400.0,
            "segmentation": [[300, 300, 320, 300, 320, 320]]}]}  # fmt: skip


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Pictures with objects, packed as COCO is."""
    folder = tmp_path_factory.mktemp("coco")
    for split, numbers in (("train", range(24)), ("val", range(100, 106))):
        path = write_scenes(folder, split, numbers, ODD)
        words = ["--data-root", str(folder / split), "--with", "objects", "--workers", "0"]
        assert pack([str(path), str(folder / "shards" / split), *words]) == 0
    recipe = folder / "toy.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return Toy(recipe, folder)


@pytest.fixture(scope="module")
def trained(objects: Toy) -> Path:
    """The folder of an uninterrupted run with averaged weights."""
    objects.run("trained", "ema.decay=0.5")
    return objects.folder / "trained"


def objective_of(objects: Toy, backbone: str, *overrides: str) -> Any:
    section, frames = BACKBONES[backbone]
    path = objects.folder / f"{backbone}.yaml"
    text = objects.recipe.read_text()
    if section is not None:
        text = re.sub(r"^model:.*?(?=^objective)", f"model: {section}\n", text, flags=re.M | re.S)
    path.write_text(text)
    method = method_of(load_tune_recipe(str(path), [f"input.frames={frames}", *overrides]))
    assert problems_of(method) == []
    torch.manual_seed(0)
    return method, method.build()


class Mapped(nn.Module):
    """A backbone and its pyramid as torchvision takes them."""

    out_channels = 16

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = [model]  # not its own: losses are compared by the one model's gradients

    def forward(self, pixels: Tensor) -> "OrderedDict[str, Tensor]":
        maps = self.model[0].head.pyramid(self.model[0].forward_maps(pixels))
        return OrderedDict(zip(("0", "1", "2", "3", "pool"), maps, strict=True))


def torchvisions(objective: Any) -> Any:
    """torchvision's own MaskRCNN with an objective's weights, for pictures that it neither resizes nor normalises."""
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    sizes = tuple((8 * 2**step,) for step in range(5))
    names = ["0", "1", "2", "3"]
    other = detection.MaskRCNN(
        Mapped(objective.model), min_size=64, max_size=96, image_mean=[0, 0, 0], image_std=[1, 1, 1],
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5), box_score_thresh=0.05,
        box_detections_per_img=10, box_batch_size_per_image=32,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2, canonical_scale=56),
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2, canonical_scale=56),
        box_head=TwoMLPHead(16 * 49, 32), box_predictor=FastRCNNPredictor(32, 4),
        mask_head=MaskRCNNHeads(16, (8,) * 4, 1), mask_predictor=MaskRCNNPredictor(8, 8, 4),
    )  # fmt: skip
    other.transform.torch_choice = lambda sizes: sizes[0]  # it draws one of one, which would shift all later draws
    other.rpn.load_state_dict(objective.model.head.rpn.state_dict())
    other.roi_heads.load_state_dict(objective.model.head.roi_heads.state_dict())
    return other


def example(method: Any) -> dict[str, Any]:
    """Two pictures with boxes and masks that fill them in part."""
    batch = method.example(2)
    batch.pop(ROW_KEYS, None)
    return batch


def test_losses_and_answers_are_torchvisions(objects: Toy) -> None:
    """On the same weights and pictures: every loss, their gradients in the backbone, and what is found, with masks."""
    method, objective = objective_of(objects, "groupmixformer", "input.train_sides=[64]", "model.drop_path=0")
    for name, parameter in objective.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.uniform_(parameter, -0.5, 0.5)
    for name in ("cls_score", "bbox_pred"):
        nn.init.normal_(getattr(objective.model.head.roi_heads.box_predictor, name).weight, std=0.3)
    other = torchvisions(objective)
    batch = example(method)
    pixels = objective.normalization(batch["video"].float() / 255)
    pictures = [one[0].permute(2, 0, 1) for one in pixels]
    targets = targets_of(batch)
    watched = objective.model.conv_stem.proj1.weight
    torch.manual_seed(5)
    ours = objective.train().losses(batch)
    (gradient,) = torch.autograd.grad(sum(ours.values()), watched)
    torch.manual_seed(5)
    theirs = other.train()(pictures, targets)
    (expected,) = torch.autograd.grad(sum(theirs.values()), watched)
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for name, value in theirs.items():
        assert value > 0
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    found = objective.eval().detect(batch)
    with torch.no_grad():
        answers = other.eval()(pictures)
    for one, answer in zip(found, answers, strict=True):
        assert len(one.boxes) == 10
        torch.testing.assert_close(torch.from_numpy(one.boxes), answer["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(one.scores), answer["scores"], rtol=1e-4, atol=1e-5)
        assert np.array_equal(one.labels + 1, answer["labels"].numpy())
        assert (one.masks != (answer["masks"][:, 0] > 0.5).numpy()).mean() < 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_learns_and_answers(objects: Toy, backbone: str) -> None:
    """A step reaches every trained parameter, also where nothing is in the pictures; those of any size are answered."""
    method, objective = objective_of(objects, backbone, "objective.least_score=0")
    batch = example(method)
    full = objective.train()(batch)
    assert full.loss.isfinite() and sorted(full.metrics) == [
        "box_loss", "class_loss", "mask_loss", "proposal_box_loss", "proposal_loss"]  # fmt: skip
    torch.testing.assert_close(full.loss.detach(), torch.stack([*full.metrics.values()]).sum())
    nothing = {**batch, "counts": torch.zeros(2, dtype=torch.int64)} | {name: batch[name][:0]
               for name in ("boxes", "labels", "masks")}  # fmt: skip
    bare = objective(nothing)
    assert float(bare.metrics["mask_loss"]) == float(bare.metrics["box_loss"]) == 0 and bare.loss.isfinite()
    bare.loss.backward()
    without = {name for name, one in objective.named_parameters() if one.requires_grad and one.grad is None}
    assert not without
    frozen = {name for name, one in objective.named_parameters() if not one.requires_grad}
    assert frozen == ({"model.norm4.weight", "model.norm4.bias"} if backbone == "groupmixformer" else set())
    parts = method.cost().macs
    assert all(parts[name] > 0 for name in ("pyramid", "proposals", "boxes", "masks")) and "head" not in parts
    picture = np.random.default_rng(0).integers(256, size=(1, 43, 57, 3), dtype=np.uint8)
    judged = method.samples().of_picture(picture)
    (found,) = objective.eval().detect(judged)
    # 64 x 85 pixels, filled up to 64 x 96: what stands there is seen by nobody.
    assert judged["video"].shape[2:4] == (64, 96) and judged["sizes"].tolist() == [[64, 85]]
    judged["video"][:, :, :, 85:] = 200
    (again,) = objective.detect(judged)
    assert np.array_equal(again.scores, found.scores) and np.array_equal(again.boxes, found.boxes)
    assert len(found.boxes) == 10 and found.masks.shape == (10, 43, 57)
    assert (found.boxes >= 0).all() and (found.boxes <= [57, 43, 57, 43]).all() and (np.diff(found.scores) <= 0).all()


def test_draws_belong_to_the_picture(objects: Toy) -> None:
    """Which anchors and boxes are learned from follows from the picture, whatever stands beside it in the batch."""
    method, objective = objective_of(objects, "groupmixformer")
    like = objective.model.head.rpn.fg_bg_sampler._like
    batch = with_row_keys(3, method.example(3))
    matched = [torch.randint(-1, 2, (5000,), generator=torch.Generator().manual_seed(one)).float() for one in range(3)]
    samplers = [PositionSampler(like, purpose) for purpose in ("anchors", "anchors", "boxes")]
    for sampler, order in zip(samplers, ([0, 1, 2], [2, 0, 1], [0, 1, 2]), strict=True):
        sampler.keys = batch[ROW_KEYS][order]
    first, turned, boxes = (
        sampler([matched[row] for row in order])
        for sampler, order in zip(samplers, ([0, 1, 2], [2, 0, 1], [0, 1, 2]), strict=True)
    )
    for kind in (0, 1):
        assert torch.equal(first[kind][2], turned[kind][0]) and torch.equal(first[kind][0], turned[kind][1])
        assert not torch.equal(first[kind][0], boxes[kind][0])
        assert int(first[kind][0].sum()) == 128
        assert (matched[0][first[kind][0].bool()] == (1, 0)[kind]).all()
    # Fewer positive ones than are wanted: negative ones fill up; of both fewer, all.
    few = torch.zeros(300)
    few[:3] = 1
    samplers[0].keys = batch[ROW_KEYS][:1]
    assert [int(mark[0].sum()) for mark in samplers[0]([few])] == [3, 253]
    assert [int(mark[0].sum()) for mark in samplers[0]([few[:10]])] == [3, 7]


def test_run_from_start_to_test(objects: Toy, trained: Path) -> None:
    """A step is judged while training and by the test alike; the files hold what the scores were computed of."""
    records = objects.records("trained")
    judged = {record["step"]: record for record in records if "eval/box_AP" in record}
    assert sorted(judged) == [3, 6] and all(record["eval/pictures"] == 6 for record in judged.values())
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert losses[-1] < 0.9 * losses[0] and all(f"train/{name}_loss" in records[0] for name in ("mask", "box", "class"))
    folder = trained / "predictions" / "step_00000006"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["box_AP"] == judged[6]["eval/box_AP"] and scores["mask_AR100"] == judged[6]["eval/mask_AR100"]
    with (folder / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["box", "disc", "wedge"], "by id, whatever the file's order"
    truth = json.loads((objects.folder / "instances_val.json").read_text())["annotations"]
    counts = [sum(one["category_id"] == number and not one["iscrowd"] for one in truth) for number in (2, 7, 31)]
    assert [int(row["objects"]) for row in rows] == counts
    found = json.loads((folder / "detections.json").read_text())
    assert {one["category_id"] for one in found} <= {2, 7, 31}
    assert {one["image_id"] for one in found} <= {*range(100, 106)}
    with Image.open(folder / "examples.png") as sheet:
        assert sheet.width > 2 * 60 and sheet.height > 3 * 56


def test_a_picture_is_answered_by_run_and_export(
    objects: Toy, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, tables = objects.folder / "val/000100.png", []
    assert export([str(trained), str(tmp_path / "weights")]) == 0
    written = json.loads((tmp_path / "weights" / "categories.json").read_text())
    assert [one["id"] for one in written["categories"]] == [2, 7, 31]
    capsys.readouterr()
    for weights in (trained, tmp_path / "weights"):
        words = ["--weights", str(weights), "--out", str(tmp_path / "out.png"), "--csv", str(tmp_path / "out.csv")]
        assert predict_main([str(picture), *words, "--top", "2"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]
        assert re.match(r" *\d+\.\d %  (box|disc|wedge) at \d+, \d+, \d+, \d+$", lines[0]) and len(lines) == 4
        with (tmp_path / "out.csv").open() as file:
            tables.append(list(csv.DictReader(file)))
        with Image.open(tmp_path / "out.png") as drawn, Image.open(picture) as shown:
            assert drawn.size == shown.size
    assert tables[0] == tables[1] and [*tables[0][0]][:2] == ["class", "score"]
    assert predict_main([str(objects.recipe), "--weights", str(trained)]) == 1
    assert "this model looks at pictures" in capsys.readouterr().err


def test_perfect_answers_get_full_marks(objects: Toy) -> None:
    """The truth itself, crowds and empty pictures among it, put through the samples and the matching: AP 100."""
    method, _ = objective_of(objects, "groupmixformer")
    source = method.recipe.data.sources["toy"]
    sets = [HeldOutSet("toy", load_index(str(objects.folder / "shards" / "train")), source)]
    matches: dict[str, list[PictureMatches]] = {"boxes": [], "masks": []}
    rows, crowds = [], 0
    for one in HeldOutSamples(sets, RowsWithoutChance(sets, method.samples()), 0, 1, 1, 60):
        batch = one.batch
        assert batch is not None and not one.unreadable
        width = int(batch["originals"][0, 1])
        masks = unpacked_masks(batch["truth_masks"].numpy(), width)
        crowds += int(batch["truth_crowd"].sum())
        found = FoundObjects(batch["truth_boxes"].numpy().astype(np.float32), batch["truth_labels"].numpy(),
                             np.ones(len(masks), np.float32), masks)  # fmt: skip
        judged = judged_picture(batch, found)
        for kind in matches:
            matches[kind].append(getattr(judged, kind))
        rows += result_rows(batch, found, categories_of(method.recipe))
    assert len(matches["boxes"]) == 24 and crowds == 2
    # Of the odd two annotations nothing can be found: they count as missed, as in pycocotools.
    assert all(coco_scores(part, 3).named()["AR100"] > 0.9 for part in matches.values())
    truth = json.loads((objects.folder / "instances_train.json").read_text())["annotations"]
    assert len(rows) == len(truth)
    # Packing mixes pictures; within one the order stays.
    for row, one in zip(sorted(rows, key=lambda row: row["image_id"]), truth, strict=True):
        assert (row["image_id"], row["category_id"]) == (one["image_id"], one["category_id"])
        size = row["segmentation"]["size"]
        assert np.array_equal(mask_of(row["segmentation"], *size), mask_of(one["segmentation"], *size))
        assert row["bbox"] == pytest.approx(one["bbox"], abs=0.01)


def test_bits_are_spread_where_they_were_packed() -> None:
    masks = np.random.default_rng(0).integers(2, size=(3, 5, 19)).astype(bool)
    assert np.array_equal(spread_bits(torch.from_numpy(packed_masks(masks)), 19).numpy(), masks)
    assert spread_bits(torch.zeros(0, 4, 2, dtype=torch.uint8), 13).shape == (0, 4, 13)


def test_pyramids_have_five_maps_of_their_strides() -> None:
    levels = [MapLevel(channels, stride) for channels, stride in ((8, 4), (12, 8), (16, 16), (20, 32))]
    maps = [torch.randn(2, level.channels, 96 // level.stride, 160 // level.stride) for level in levels]
    expected = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    assert [tuple(one.shape[2:]) for one in JoinedPyramid(levels, 16)(maps)] == expected
    for stride in (8, 16, 32):
        single = MapLevel(24, stride)
        found = SimplePyramid(single, 16)([torch.randn(2, 24, 96 // stride, 160 // stride)])
        assert [tuple(one.shape) for one in found] == [(2, 16, *size) for size in expected]
    assert pyramid_problems(levels) == [] and pyramid_problems([MapLevel(24, 14)])
    assert pyramid_problems(levels[1:])[0].startswith("model: maps of strides [8, 16, 32]")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("model.classes=0", "model.classes: found 0, allowed: 1 or more"),
        ("objective.channels=0", "objective.channels: found 0, allowed: 1 or more"),
        ("objective.boxes=2", "objective.boxes: found 2, allowed: 4 or more"),
        ("objective.least_score=1", "objective.least_score: found 1"),
        ("zero.stage=3", "zero.stage: found 3, allowed with held-out pictures: 0 to 2"),
        ("input.pad=16", "input.pad: found 16, allowed: multiples of 32"),
        ("input.train_sides=[]", "input.train_sides: found [], allowed: one or more numbers above 0"),
        ("input.crop_size=64", "input.train_sides: has no effect with input.crop_size"),
        ("data.sources.toy.sampling=sparse", "data.sources.toy.sampling: has no effect with objective.name="),
        ("evaluate.clips=2", "evaluate.clips: has no effect with objective.name=coco"),
    ],
)
def test_what_can_not_work_is_named(objects: Toy, wrong: str, told: str) -> None:
    found = problems_of(method_of(load_tune_recipe(str(objects.recipe), [wrong])))
    assert any(line.startswith(told) for line in found), found


def test_tokens_of_other_distances_are_refused(objects: Toy) -> None:
    objective_of(objects, "image_vit")  # writes the file
    words = ["model.patch_size=4", "model.image_size=64"]
    found = problems_of(method_of(load_tune_recipe(str(objects.folder / "image_vit.yaml"), words)))
    assert found == ["model.patch_size: tokens 4 pixels apart; allowed with this task: 8, 16 or 32"]


def test_categories_are_cocos_or_a_files(objects: Toy, tmp_path: Path) -> None:
    known = coco_categories()
    assert len(known) == 80 and (known[0].id, known[-1].id, known[-1].name) == (1, 90, "toothbrush")
    assert (known[11].id, known[11].name) == (13, "stop sign") and len({one.name for one in known}) == 80
    named = read_categories(str(objects.folder / "instances_train.json"))
    assert [one.name for one in named] == ["box", "disc", "wedge"]
    (tmp_path / "two.txt").write_text("a\nb\n")
    recipe = load_tune_recipe(str(objects.recipe), [f"data.sources.toy.labels={tmp_path / 'two.txt'}"])
    with pytest.raises(DataError, match=r"two.txt: 2 categories, model.classes=3"):
        method_of(recipe).samples()
    (tmp_path / "twice.json").write_text('{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}')
    for name, told in (("twice", "stands there twice"), ("none", "not COCO's json")):
        (tmp_path / "none.json").write_text("[1]")
        with pytest.raises(DataError, match=told):
            read_categories(str(tmp_path / f"{name}.json"))


def test_the_plan_counts_it(capsys: pytest.CaptureFixture[str], objects: Toy) -> None:
    assert finetune_main(["--recipe", str(objects.recipe), "--dry-run"]) == 0
    assert "proposals" in capsys.readouterr().out
