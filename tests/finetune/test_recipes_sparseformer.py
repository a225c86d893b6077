"""Recipes of SparseFormer: each loads, is sound, can be planned, and says what was published."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from finetune.commands.finetune import main as finetune_main
from finetune.recipe import load_tune_recipe
from pretrain.objectives.base import method_of, problems_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import recipe_names, recipe_path

ROOT = Path(__file__).resolve().parents[2]
#: Parameters, all products, tokens, drop path, format (systems/sparseformer.md, sections 4 to 6).
IMAGES: dict[str, tuple[int, str, str, float, str]] = {
    "sparseformer_tiny_in1k": (31_522_212, "2.2 GMAC", "49", 0.2, "bf16"),
    "sparseformer_small_in1k": (47_575_056, "4.0 GMAC", "64", 0.3, "bf16"),
    "sparseformer_base_in1k": (81_076_996, "8.0 GMAC", "81", 0.4, "fp32"),
}
CLIPS: dict[str, tuple[str, str, float]] = {
    "sparseformer_tiny_k400": ("23.1 GMAC", "392", 0.2),
    "sparseformer_small_k400": ("39.1 GMAC", "512", 0.3),
    "sparseformer_base_k400": ("75.0 GMAC", "648", 0.4),
}


def test_there_is_a_recipe_for_every_row() -> None:
    names = {name for name in recipe_names("finetune") if name.startswith("sparseformer")}
    assert {name for name in names if "bootstrap" not in name} == {*IMAGES, *CLIPS}


def planned(name: str) -> tuple[Any, dict[str, str]]:
    method = method_of(load_tune_recipe(name))
    assert problems_of(method) == []
    return method.recipe, {row.strip(): value for section in dry_run(method) for row, value, _ in section.rows}


@pytest.mark.parametrize("name", IMAGES)
def test_published_numbers(name: str) -> None:
    parameters, work, tokens, drop_path, dtype = IMAGES[name]
    recipe, values = planned(name)
    assert (int(values["parameters"].replace(",", "")), values["forward pass"]) == (parameters, work)
    assert (values["all tokens"], recipe.model.drop_path, recipe.model.parity) == (tokens, drop_path, "train")
    assert (float(values["peak"]), float(values["warm-up from"]), float(values["end"])) == (1e-3, 1e-6, 1e-5)
    assert values["accumulation"] == "1" and recipe.input.views == 3 and recipe.compute.dtype == dtype
    optim, schedule, augment = recipe.optim, recipe.schedule, recipe.augment
    assert (optim.name, optim.weight_decay, optim.clip_grad, optim.layer_decay) == ("adamw", 0.05, 5, 1)
    assert (optim.betas, optim.eps, recipe.ema.decay) == ((0.9, 0.999), 1e-8, 0.9999)
    assert (schedule.epochs, schedule.warmup_epochs, schedule.decay_from_epoch) == (300, 20, 0)
    assert (augment.randaugment, augment.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augment.mixup, augment.cutmix, augment.switch_probability, recipe.objective.smoothing) == (0.8, 1, 0.5, 0.1)


@pytest.mark.parametrize("name", CLIPS)
def test_clips(name: str) -> None:
    work, tokens, drop_path = CLIPS[name]
    recipe, values = planned(name)
    assert (values["forward pass"], values["all tokens"], recipe.model.drop_path) == (work, tokens, drop_path)
    assert (recipe.input.size, recipe.model.temporal_offsets) == ((32, 224, 224), "spread")
    assert (recipe.evaluate.clips, recipe.evaluate.crops) == (4, 3)
    assert "NOT an official recipe" in recipe_path(name, folder="finetune").read_text()


def test_commands_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that need no data."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/systems/sparseformer.md").read_text(), re.DOTALL)
    for line in block.splitlines():
        program, script, *words = shlex.split(line)
        assert (program, script) == ("python", "launch/finetune.py") and finetune_main(words) == 0, line
    assert "23.1 GMAC" in capsys.readouterr().out
