"""AdaptFormer's published rows: the recipes load, are sound, and train as many parameters as the paper says."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from finetune.classification.predictions import Predictions, read_predictions
from finetune.recipe import Augment, load_tune_recipe
from pretrain.engine.schedules import build_schedule
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import recipe_names
from pretrain.samples.augment import augment
from pretrain.samples.augmented_clip import Config
from pretrain.samples.frame_choice import VideoFacts
from pretrain.samples.sampling import clip_starts
from pretrain.samples.transforms import crop_resize, multiscale_box

#: Trained parameters on SSv2 and HMDB51: systems/adaptformer.md section 3.8.
TRAINED = {
    "linear": (135_342, 40_755),
    "vpt": (144_558, 49_971),
    "adaptformer1": (163_002, 68_415),
    "adaptformer4": (218_334, 123_747),
    "adaptformer64": (1_324_974, 1_230_387),
    "full": (86_361_006, None),
}
ROWS = [(method, data) for method in TRAINED for data in ("ssv2", "hmdb51")]


def test_there_is_a_recipe_for_every_row() -> None:
    recipes = {name: load_tune_recipe(name) for name in recipe_names("finetune")}
    found = {
        name
        for name, recipe in recipes.items()
        if (recipe.optim.name, recipe.objective.name, recipe.model.name) == ("sgd", "classification", "classifier")
    }
    assert found == {f"vit_b_{method}_{data}" for method, data in ROWS}


@pytest.mark.parametrize(("method", "data"), ROWS)
def test_published_numbers(method: str, data: str) -> None:
    recipe = load_tune_recipe(f"vit_b_{method}_{data}")
    assert problems_of(method_of(recipe)) == []
    warnings = [line for line in warnings_of(method_of(recipe)) if "no multiple of" not in line]
    assert len(warnings) == 1 and "run.init_weights is null" in warnings[0]
    values = {
        row.strip(): value
        for section in reversed(dry_run(method_of(recipe)))
        for row, value, _ in reversed(section.rows)
    }
    trained = int(values.get("trained", values["parameters"]).replace(",", ""))
    expected = TRAINED[method][data == "hmdb51"]
    assert expected is None or trained == expected
    assert float(values["peak"]) == pytest.approx(0.4) and values["end"] == "0" and values["accumulation"] == "1"
    assert (recipe.optim.momentum, recipe.optim.weight_decay, recipe.optim.layer_decay) == (0.9, 0, 1)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, recipe.schedule.warmup_ends) == (90, 10, "start")
    assert (recipe.model.head, recipe.model.drop_path, recipe.objective.smoothing) == ("batch_norm", 0, 0)
    assert (recipe.input.frames, recipe.input.crop, recipe.input.views) == (8, "multiscale", 1)
    assert (recipe.evaluate.clips, recipe.evaluate.crops, recipe.evaluate.average) == (4, 3, "logits")
    assert all(not source.flip and source.sampling == "strided" for source in recipe.data.sources.values())
    augment = recipe.augment
    assert not augment.randaugment and augment.erasing == augment.mixup == augment.cutmix == 0


@pytest.mark.parametrize(("method", "data"), ROWS)
def test_learning_rate_is_the_official_one(method: str, data: str) -> None:
    """lr(e), e = epoch + iteration / len (systems/adaptformer.md section 4), through warm-up, decay and both ends."""
    per = {"ssv2": 164, "hmdb51": 3}[data]
    schedule = build_schedule(load_tune_recipe(f"vit_b_{method}_{data}"), per)
    assert (schedule.total, schedule.warmup) == (90 * per, 10 * per)
    for epoch, iteration in itertools.product((0, 1, 9, 10, 11, 50, 89), (0, 1, per - 1)):
        e = epoch + iteration / per
        expected = 0.4 * e / 10 if e < 10 else 0.4 * (1 + math.cos(math.pi * (e - 10) / (90 - 10))) / 2
        assert schedule.lr(epoch * per + iteration) == pytest.approx(expected, rel=1e-9), (epoch, iteration)


def test_strided_frames_are_those_of_pre_training() -> None:
    rule = Config(frames=8, stride=2).frame_choice("strided", 4)
    starts = {int(rule.training(VideoFacts(35), np.random.default_rng(seed))[0]) for seed in range(60)}
    assert starts == set(range(clip_starts(35, 8, 4))) == {0, 1, 2, 3}
    assert (np.diff(rule.training(VideoFacts(100), np.random.default_rng(0))) == 4).all()
    assert rule.validation(VideoFacts(36)).tolist() == [2, 6, 10, 14, 18, 22, 26, 30]
    assert rule.validation(VideoFacts(10)).tolist() == [0, 4, 8, 8, 8, 8, 8, 8], "a short video repeats a frame"


def test_crops_are_those_of_pre_training() -> None:
    clip = np.random.default_rng(0).integers(0, 255, (2, 60, 80, 3), dtype=np.uint8)
    plain = Augment(randaugment=None, erasing=0)
    for seed in range(5):
        view = augment(
            clip, plain, False, (32, 32), lambda purpose, seed=seed: np.random.default_rng(seed), "multiscale"
        )
        box = multiscale_box(80, 60, 32, 32, np.random.default_rng(seed))
        assert (view == crop_resize(clip, box, 32, 32)).all()


def test_mean_of_logits_is_another_result(tmp_path: Path) -> None:
    logits = np.array([[[5.0, 0, 0], [0, 2.6, 0], [0, 2.6, 0]]], np.float32)
    merged = {
        average: Predictions("single", list("abc"), ["x"], np.zeros(1, int), logits, average=average).merged[0]
        for average in ("probabilities", "logits")
    }
    expected = np.exp(logits[0].mean(0))
    assert np.allclose(merged["logits"], expected / expected.sum(), atol=1e-6)
    assert not np.allclose(merged["logits"], merged["probabilities"], atol=1e-2)
    Predictions("single", list("abc"), ["x"], np.zeros(1, int), logits, average="logits").write_part(tmp_path, 0)
    assert np.allclose(read_predictions(tmp_path).merged[0], merged["logits"]), "scored again in the same way"
