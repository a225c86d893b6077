"""TDN as a user runs it: segments of toy videos, mirrored with their labels, tested and exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune.classification.exports import graph_facts
from finetune.classification.frame_facts import choice_of
from finetune.classification.label_sources import mirrored_classes, source_rules
from finetune.classification.labels import LabelMap
from finetune.classification.predictions import read_predictions
from finetune.classification.validation import test_views as views_of_the_test
from finetune.classification.validation import video_sets
from finetune.classification.views import TrainingViews, held_out_videos
from finetune.commands import export, predict
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.data.fetch import SampleReader
from pretrain.data.members import parse_sample
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import DataError
from pretrain.models.classifier_weights import load_pretrained
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.samples.augment import mirrors

RECIPE = """\
model: {name: tdn, width: 8, blocks: [1, 1, 1, 1], classes: 3, dropout: 0.5}
objective: {name: classification, smoothing: 0}
input: {name: segments, segments: 2, height: 36, width: 36}
data:
  sources:
    toy: {shards: FOLDER/train, val: FOLDER/val, sampling: sparse, short_side: 40, flip_labels: [[left, 2]]}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {name: sgd, base_lr: 0.01, base_batch: 8, weight_decay: 5e-4, clip_grad: 20, layer_decay: 1, decayed: all}
schedule: {epochs: 1, warmup_epochs: 0, shape: steps, milestones: [0.5]}
augment: {randaugment: null, erasing: 0, mixup: 0, cutmix: 0}
evaluate: {clips: 2, crops: 3, crop_size: 40, micro: 6, workers: 0, pictures: 2}
compute: {dtype: fp32}
zero: {stage: 0}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""


@pytest.fixture(scope="module")
def recipe_file(toy: Any) -> Path:
    path: Path = toy.folder / "tdn.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(toy.folder)))
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> TuneRecipe:
    return load_tune_recipe(str(recipe_file))


def test_run_test_export_and_predict(toy: Any, recipe_file: Path, tmp_path: Path) -> None:
    run = type(toy)(recipe_file, toy.folder)
    run.run("tdn")
    folder = toy.folder / "tdn"
    predictions = read_predictions(next((folder / "predictions").iterdir()))
    assert predictions.logits.shape == (11, 6, 3) and np.isfinite(predictions.logits).all()
    assert export.main([str(folder), str(tmp_path / "tdn.pth.tar"), "--format", "official"]) == 0
    content = torch.load(tmp_path / "tdn.pth.tar", weights_only=True)["state_dict"]
    assert content["module.base_model.layer2_bak.0.shift.conv.weight"].shape == (16, 1, 3)
    model = method_of(load_tune_recipe(str(recipe_file))).build().model
    assert load_pretrained(model, str(tmp_path / "tdn.pth.tar")).layout == "released TDN"
    words = ["--clips", "2", "--crops", "3", "--out", str(tmp_path / "views.png")]
    assert predict.main([str(toy.clip()), "--weights", str(folder), *words]) == 0


def test_an_exported_graph_knows_its_segments(recipe: TuneRecipe, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("down\nleft\nright\n")
    facts = json.loads(json.dumps(graph_facts(recipe, tmp_path)))
    assert (facts["sampling"], facts["segments"], facts["window"]) == ("segments", 2, 5)
    assert (facts["geometry"], facts["clip"], facts["short_side"]) == ("tsn", [10, 36, 36], 40)
    assert choice_of(facts, "a.onnx") == recipe.input.frame_choice("sparse", None)


def test_a_mirrored_view_has_the_other_label(recipe: TuneRecipe) -> None:
    make = TrainingViews(recipe, source_rules(recipe))
    index = video_sets(recipe, test=False)[0].index
    members = [parse_sample(SampleReader([index], None, 10).read(0, 0, row)) for row in range(3)]
    counts = {True: 0, False: 0}
    for position in range(12):
        place, label = Place(0, position, 0, 0, 0), position % 3
        made = make(place, SourceInfo("toy", (), recipe.data.sources["toy"]), members[label])
        flipped = mirrors(True, make._draw(place, 0))
        assert made["target"].tolist() == [[0, 2, 1][label] if flipped else label]
        counts[flipped] += 1
    assert min(counts.values()) > 2


def test_several_labels_are_exchanged_in_their_columns(recipe: TuneRecipe) -> None:
    recipe.objective.task = "multi"
    make = TrainingViews(recipe, source_rules(recipe))
    rules = source_rules(recipe)[0]
    place = next(p for p in (Place(0, n, 0, 0, 0) for n in range(9)) if mirrors(True, make._draw(p, 0)))
    assert make._target_of(place, 0, np.array([1, 1, 0], np.float32), rules).tolist() == [1, 0, 1]


def test_pairs_of_mirrored_classes() -> None:
    labels = LabelMap(4, ("a", "left", "right", "b"))
    assert mirrored_classes("toy", [["left", "right"]], labels) == (0, 2, 1, 3)
    assert mirrored_classes("toy", [["1", "2"], ["0", "b"]], labels) == (3, 2, 1, 0)
    for pairs, told in (
        ([["left"]], r"allowed: pairs of classes such as \[86, 87\]"),
        ([["left", "up"]], "data.sources.toy.flip_labels: .'left', 'up'.: 'up' is none of the 4 class names"),
        ([["1", "7"]], "no class from 0 to 3"),
        ([["left", "right"], ["right", "a"]], "a class is in two pairs"),
        ([["left", "left"]], "a class is in two pairs"),
    ):
        with pytest.raises(DataError, match=told):
            mirrored_classes("toy", pairs, labels)


def test_views_of_the_test_are_random_clips_of_each_video(recipe: TuneRecipe) -> None:
    views, sets = views_of_the_test(recipe), video_sets(recipe, test=True)
    assert views.size == (10, 40, 40)
    video = next(iter(held_out_videos(sets, views, 0, 1, 10))).batch["views"].numpy()
    again = next(iter(held_out_videos(sets, views, 0, 1, 10))).batch["views"].numpy()
    assert video.shape == (6, 10, 40, 40, 3) and (video == again).all(), "the same in every test"
    # 64 x 48 with short side 40 is 53 x 40: crops at 0, 4 * 3 and 2 * 3.
    left, right, centre = video[:3]
    assert (left[:, :, 12:] == right[:, :, :28]).all() and (left[:, :, 6:] == centre[:, :, :34]).all()
    assert (video[:3] != video[3:]).any()


def test_recipes_that_cannot_work(recipe_file: Path) -> None:
    def told(*words: str) -> str:
        return "\n".join(problems_of(method_of(load_tune_recipe(str(recipe_file), list(words)))))

    assert told() == ""
    assert "data.sources.toy.sampling: found strided" in told("data.sources.toy.sampling=strided")
    assert "evaluate.crops: found 5, allowed with input.name=segments: 1 (centre), 3" in told("evaluate.crops=5")
    assert "compute.dtype: found bf16, allowed with model.name=tdn: fp32" in told("compute.dtype=bf16")
    assert "optim.head_rate: found 0.0" in told("optim.head_rate=0")
    assert "evaluate.crop_size: found 0" in told("evaluate.crop_size=0")
    assert "flip_labels: values to regress" in told("objective.task=regression")


def test_other_models_have_one_size(toy: Any) -> None:
    found = problems_of(method_of(load_tune_recipe(str(toy.recipe), ["evaluate.crop_size=48"])))
    assert "evaluate.crop_size: found 48, allowed with model.name=classifier: null" in "\n".join(found)


def test_flips_of_named_classes_are_no_warning(recipe_file: Path) -> None:
    def told(*words: str) -> str:
        return "\n".join(warnings_of(method_of(load_tune_recipe(str(recipe_file), list(words)))))

    assert "flip" not in told() and "sampling" not in told()
    assert "data.sources.toy.flip_labels has no effect" in told("data.sources.toy.flip=false")


def test_rates_of_biases_and_head_and_decay(recipe_file: Path) -> None:
    def rules(*words: str) -> dict[str, tuple[float, bool]]:
        objective = method_of(load_tune_recipe(str(recipe_file), list(words))).build()
        found = {name: objective.rule(name, value.shape) for name, value in objective.named_parameters()}
        return {name.removeprefix("model."): (one.lr_scale, one.decays) for name, one in found.items()}

    assert set(rules().values()) == {(1.0, True)}, "as released: everything alike"
    found = rules("optim.decayed=matrices", "optim.bias_rate=2", "optim.head_rate=5")
    assert found["stem.conv.weight"] == (1, True) and found["stem.conv.bias"] == (2, False)
    assert found["stem.bn.weight"] == found["stem.bn.bias"] == (1, False)
    assert found["head.weight"] == (5, True) and found["head.bias"] == (10, False)
