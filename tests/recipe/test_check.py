"""Cross-field checks: each finds its own mistake, names key and remedy, and leaves a good recipe alone."""

import re
from typing import Any

import pytest

from pretrain.data.samples import Samples
from pretrain.errors import RecipeError
from pretrain.models import image_vit
from pretrain.models.base import Classifier, Cost
from pretrain.objectives.base import Method, Objective, method_of, problems_of, warnings_of
from pretrain.recipe.components import load_component
from pretrain.recipe.load import load_recipe
from pretrain.samples import clip


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["batch.micro=5"], "batch.micro: found 5, allowed: a divisor of batch.samples"),
        (["batch.samples=0"], "batch.samples: found 0, allowed: more than 0"),
        (["data.sources={}"], "data.sources: none"),
        (["data.sources.camera.weight=null"], "actions have a weight and camera have none"),
        (["data.sources.actions.weight=-1", "data.sources.camera.weight=1"], "data.sources.actions.weight: found -1"),
        (["data.sources.camera.stride=0"], "data.sources.camera.stride: found 0"),
        (["input.stride=0"], "input.stride: found 0, allowed: more than 0"),
        (["input.frames=0"], "input.frames: found 0"),
        (["data.epoch_samples=3"], "data.epoch_samples: 3 videos are less than one step"),
        (["data.epoch_samples=9", "data.compose=alternate"], "than one step of batch.samples = 8 of each of 2 sources"),
        (["input.fps=8", "data.sources.actions.stride=2"], "data.sources.actions.stride: found 2, allowed: null where"),
        (["schedule.warmup_epochs=500"], "schedule.warmup_epochs: 500"),
        (["optim.base_min_lr=1"], "optim.base_min_lr: 1 is more than optim.base_lr"),
        (["optim.betas=[0.9, 1]"], "optim.betas: found [0.9, 1.0]"),
        (["zero.stage=4"], "zero.stage: found 4"),
        (["compute.fp8=rowwise"], "compute.fp8: found rowwise with compute.compile=false, allowed: true"),
        (["compute.fp8=rowwise", "compute.dtype=fp32"], "compute.fp8: found rowwise with compute.dtype=fp32"),
        (["compute.fp8=tensorwise", "zero.stage=3"], "compute.fp8: found tensorwise with zero.stage=3, allowed: 0, 1"),
        (["optim.base_lr=nan"], "optim.base_lr: found nan, allowed: a finite number"),
        (["optim.betas=[0.9, .nan]"], "optim.betas: found nan, allowed: a finite number"),
        (["objective.mask_ratio=nan"], "objective.mask_ratio: found nan"),
        (["data.sources.camera.weight=.nan"], "data.sources.camera.weight: found nan, allowed: a finite number"),
        (["schedule.epochs=.inf"], "schedule.epochs: found inf"),
        (["batch.samples=99999999999999999999"], "batch.samples: found a whole number of 67 bits, allowed: at most 63"),
        (["batch.samples=1000000000000000002"], "batch.micro=3 fits"),
        (["run.seed=18446744073709551616"], "run.seed: found a whole number of 65 bits"),
        (["input.stride=-99999999999999999999"], "input.stride: found a whole number of 67 bits"),
        (["run.seed=-1"], "run.seed: found -1, allowed: 0 or more"),
        (["data.bad_rate=2"], "data.bad_rate: found 2"),
        (["input.height=100"], "input.height=100"),
        (["input.frames=15"], "input.frames=15"),
        (["input.height=72"], "running_cell needs an even number"),
        (["objective.decoder_mask_ratio=0.4"], "objective.decoder_mask_ratio=0.4"),
        (["objective.mask_ratio=1"], "objective.mask_ratio=1.0"),
        (["model.heads=5"], "model.heads=5"),
        (["model.heads=0"], "model.heads: found 0, allowed: more than 0"),
        (["model.dim=0"], "model.dim: found 0, allowed: more than 0"),
        (["model.dim=1000000000"], "model.dim: found 1000000000, allowed: up to 1048576"),
        (["model.decoder_depth=100000"], "model.decoder_depth: found 100000, allowed: up to 10000"),
        (["input.height=1600000000"], "GB of pixels for each clip, allowed: up to 4.3 GB"),
        (["model.patch_size=0"], "model.patch_size: found 0, allowed: more than 0"),
        (["model.patch_size=-8"], "model.patch_size: found -8, allowed: more than 0"),
        (["model.tubelet=0"], "model.tubelet: found 0, allowed: more than 0"),
        (["model.dim=null"], "model.dim: null"),
    ],
)
def test_mistake_is_found(overrides: list[str], expected: str) -> None:
    problems = problems_of(method_of(load_recipe("demo", overrides)))
    assert any(expected in problem for problem in problems), problems


IMAGE: dict[str, Any] = {"image_size": 64, "patch_size": 16, "dim": 48, "depth": 1, "heads": 3}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.patch_size=0", "model.patch_size: found 0, allowed: more than 0"),
        ("model.heads=0", "model.heads: found 0, allowed: more than 0"),
        ("model.heads=5", "model.heads=5: does not divide model.dim=48"),
        ("model.image_size=60", "model.image_size=60: no multiple of model.patch_size=16"),
        ("model.classes=-1", "model.classes=-1: 0 (no head) or more is needed"),
        ("model.drop_path=1", "model.drop_path=1.0: a probability from 0 to below 1 is needed"),
        ("input.frames=2", "input.frames=2: image_vit takes single pictures"),
        ("input.height=72", "input.height=72: not a multiple of model.patch_size=16"),
    ],
)
def test_an_image_model_that_can_not_be_built(word: str, expected: str) -> None:
    section, _, key = word.partition("=")[0].partition(".")
    value = float(word.partition("=")[2])
    model, of_clips = dict(IMAGE), dict(frames=1, height=64, width=64)
    (model if section == "model" else of_clips)[key] = value if key == "drop_path" else int(value)
    config = image_vit.Config(**model)
    (problem,) = image_vit.ImageViTArchitecture(config, clip.Config(**of_clips)).problems()
    assert problem.startswith(expected)
    if section == "model":
        with pytest.raises(RecipeError, match=re.escape(expected)):
            image_vit.ImageViT(config)


def test_several_mistakes_are_one_list() -> None:
    recipe = load_recipe("demo", ["batch.micro=5", "run.seed=-1", "model.heads=5", "data.sources={}"])
    assert (
        len(
            [
                p
                for p in problems_of(method_of(recipe))
                if p.startswith(("batch.micro", "run.", "model.", "data.sources"))
            ]
        )
        == 4
    )


def test_batch_must_divide_over_the_launched_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("demo", ["batch.samples=48", "batch.micro=8", "batch.ranks=null"])
    assert problems_of(method_of(recipe)) == [] == problems_of(method_of(recipe), ranks=3)
    (problem,) = problems_of(method_of(recipe), ranks=4)
    assert "48 is no multiple of batch.micro x ranks = 8 x 4" in problem and "batch.micro=6 fits" in problem
    (problem,) = problems_of(method_of(recipe), ranks=5)
    assert "batch.samples must be a multiple of 5" in problem
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert len(problems_of(method_of(recipe))) == 1


def test_model_of_another_kind() -> None:
    recipe = load_recipe("demo")
    recipe.model = load_component("model", "classifier", "pretrain.models.{}").Config()
    (problem,) = problems_of(method_of(recipe))
    assert problem == (
        "model.name: found classifier, of the kind Classifier; allowed with objective videomae: the kind "
        "MaskedAutoencoder (An encoder of visible cubes with a decoder that predicts cubes)"
    )


class Silent(Method):
    """A method of a user's that says nothing of problems."""

    def samples(self) -> Samples:
        raise NotImplementedError

    def build(self) -> Objective:
        raise NotImplementedError

    def cost(self) -> Cost:
        raise NotImplementedError


def test_the_model_is_judged_for_a_method_that_judges_nothing() -> None:
    assert any("model.heads=5" in problem for problem in problems_of(Silent(load_recipe("demo", ["model.heads=5"]))))
    assert problems_of(Silent(load_recipe("demo"))) == []


class Needing(Silent):
    MODEL = Classifier


def test_a_model_of_another_kind_is_told_beside_all_else() -> None:
    problems = problems_of(Needing(load_recipe("demo", ["batch.micro=5"])))
    assert problems[0].startswith("batch.samples") and "the kind Classifier (A backbone with a head" in problems[-1], (
        problems
    )


def test_decoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = problems_of(method_of(load_recipe("demo", ["input.decoder=torchcodec"])))
    assert "not installed" in problem and "pip install 'tubelet[torchcodec]'" in problem


@pytest.mark.parametrize(("version", "told"), [(None, True), ("13.0", False)])
def test_decoder_on_a_gpu_needs_a_torch_for_gpus(
    version: str | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.version.cuda", version)
    problems = problems_of(method_of(load_recipe("demo", ["input.decoder=torchcodec_cuda"])))
    assert len(problems) == told
    for problem in problems:
        assert "built without CUDA" in problem and "tubelet[torchcodec]" in problem and "libnvcuvid" in problem


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.cache_gb=3"], "data.cache_gb"),
        (["zero.stage=0", "zero.offload=cpu"], "zero.offload"),
        (["zero.init=always"], "zero.init"),
        (["checkpoint.every_steps=3", "checkpoint.every_epochs=2"], "checkpoint.every_epochs"),
        (["log.pictures_every_steps=0", "log.pictures=9"], "log.pictures"),
        (["objective.decoder_mask=none", "objective.decoder_mask_ratio=0.25"], "objective.decoder_mask_ratio"),
        (["batch.ranks=3"], "lanes"),
    ],
)
def test_option_without_effect_is_a_warning(overrides: list[str], expected: str) -> None:
    before = warnings_of(method_of(load_recipe("demo", ["checkpoint.every_epochs=5"])))
    after = warnings_of(method_of(load_recipe("demo", overrides)))
    assert before == [] and len(after) == 1 and expected in after[0]
