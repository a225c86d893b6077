"""A SparseFormer of clips as a user trains it: from an image model's weights to a prediction with its regions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finetune.commands import predict
from finetune.recipe import load_tune_recipe
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.engine.build import build_on_meta
from pretrain.models.sparseformer import Config
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.sparseformer.sparseformer_weights import export_sparseformer
from pretrain.objectives.base import method_of

MODEL = {"size": "custom", "form": "v1", "tokens": 4, "focus_dim": 64, "dim": 64, "depth": 1, "repeats": 2,
         "points": 9, "channels": 8}  # fmt: skip
STEPS = 3


@pytest.fixture(scope="module")
def recipe(toy: Any) -> Path:
    """The toy recipe with a SparseFormer in it."""
    words = ", ".join(f"{key}: {value}" for key, value in MODEL.items())
    lines = toy.recipe.read_text().splitlines()
    model = f"model: {{name: sparseformer, {words}, classes: 3, video: true, replicates: 2, drop_path: 0.2, "
    path = toy.folder / "toy_sparseformer.yaml"
    path.write_text("\n".join([f"{model}region_lr_scale: 0.1}}", *lines[2:]]))
    return path


@pytest.fixture(scope="module")
def trained(toy: Any, recipe: Path) -> str:
    """A run from image weights in the train code's layout, in bfloat16 with sharded weights; what was printed."""
    torch.manual_seed(0)
    image = SparseFormer(Config(**MODEL, classes=5))
    export_sparseformer(image, str(toy.folder / "image.pth"), "train")
    own = type(toy)(recipe, toy.folder)
    return str(own.run(
        "sparse", f"run.init_weights={toy.folder / 'image.pth'}", f"schedule.max_steps={STEPS}", "ema.decay=0.9",
        "evaluate.clips=1", "evaluate.crops=1", "log.pictures_every_steps=3", "log.pictures=1", "optim.base_lr=0.01",
        "compute.dtype=bf16", "zero.stage=3",
    ))  # fmt: skip


def test_it_trains_from_an_image_models_weights(toy: Any, trained: str) -> None:
    assert "tensors matched" in trained and "head [(5, 64), (5,)] is left out" in trained
    state = consolidated_state(toy.folder / "sparse" / "checkpoints" / f"step_{STEPS:08d}")
    assert state["model.initial_roi.weight"].shape == (8, 6)
    assert [record["eval/top1"] for record in toy.records("sparse") if "eval/top1" in record]
    assert list((toy.folder / "sparse").rglob("*.gif")), "pictures of its first and last look"


def test_a_prediction_with_its_regions(
    toy: Any, trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(toy.clip()), "--weights", str(toy.folder / "sparse"), "--out", str(tmp_path / "a.png")]
    assert predict.main([*words, "--regions", str(tmp_path / "regions.png")]) == 0
    assert f"regions: {tmp_path / 'regions.png'}" in capsys.readouterr().out
    assert Image.open(tmp_path / "regions.png").size == (4 * (192 + 2) + 2, 3 * (192 + 14)), "three looks, four frames"


def test_rates_and_decay(recipe: Path) -> None:
    objective = build_on_meta(method_of(load_tune_recipe(str(recipe))))
    region, other = "model.layers.0.roi_adjust_module.1.weight", "model.layers.0.attn.proj.weight"
    assert objective.rule(region, (6, 64)).lr_scale == pytest.approx(0.1 * objective.rule(other, (64, 64)).lr_scale)
    assert not objective.rule("model.initial_roi.weight", (8, 6)).decays
    assert objective.rule("model.initial_embedding.weight", (8, 64)).decays
