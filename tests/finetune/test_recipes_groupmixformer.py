"""Recipes of GroupMixFormer: each loads, is sound, can be planned, and says what was published."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.commands.finetune import main as finetune_main
from finetune.recipe import load_tune_recipe
from pretrain.engine.build import build_on_meta, count_model
from pretrain.models.weight_files import read_raw
from pretrain.objectives.base import method_of, problems_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import recipe_names

ROOT = Path(__file__).resolve().parents[2]
#: Parameters, work, drop path, side of pictures, peak rate (systems/groupmixformer.md, sections 3 and 4).
PUBLISHED: dict[str, tuple[int, str, float, int, float]] = {
    "groupmixformer_mobile_in1k": (5_733_120, "1.3 GMAC", 0.1, 224, 5e-4),
    "groupmixformer_t_in1k": (10_949_152, "3.7 GMAC", 0.1, 224, 5e-4),
    "groupmixformer_s_in1k": (22_421_320, "5.2 GMAC", 0.2, 224, 5e-4),
    "groupmixformer_b_in1k": (45_827_272, "17.6 GMAC", 0.5, 224, 5e-4),
    "groupmixformer_l_in1k": (71_833_648, "38.2 GMAC", 0.5, 224, 5e-4),
    "groupmixformer_l_in1k_384": (71_833_648, "112.4 GMAC", 0.5, 384, 1e-5),
}


def test_there_is_a_recipe_for_every_row() -> None:
    names = [name for name in recipe_names("finetune") if name.startswith("groupmixformer") and "in1k" in name]
    assert set(names) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    parameters, work, drop_path, side, peak = PUBLISHED[name]
    method = method_of(load_tune_recipe(name))
    assert problems_of(method) == []
    recipe: Any = method.recipe
    values = {row.strip(): value for section in dry_run(method) for row, value, _ in section.rows}
    assert (int(values["parameters"].replace(",", "")), values["forward pass"]) == (parameters, work)
    assert recipe.model.drop_path == drop_path and recipe.model.batch_norm == "all_ranks"
    assert recipe.input.size == (1, side, side) and recipe.input.evaluated_side == int(256 / 224 * side)
    assert float(values["peak"]) == pytest.approx(peak) and values["accumulation"] == "1"
    assert (recipe.batch.samples, recipe.optim.clip_grad, recipe.optim.weight_decay) == (512, 5, 0.05)
    assert recipe.optim.betas == (0.9, 0.999) and recipe.optim.layer_decay == 1
    assert (recipe.schedule.decay_from_epoch, recipe.schedule.warmup_ends) == (0, "start")
    augment = recipe.augment
    assert (augment.randaugment, augment.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augment.mixup, augment.cutmix, augment.switch_probability, recipe.objective.smoothing) == (0.8, 1, 0.5, 0.1)
    if side == 224:
        assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs) == (300, 20)
        assert (float(values["warm-up from"]), float(values["end"])) == (5e-7, 5e-6)


def test_the_official_layout_comes_back(tmp_path: Path) -> None:
    """What export.py writes is a released file to the importer: a dictionary `model`, official names, statistics."""
    sizes = ("dims=[20,20,20,20]", "depths=[1,1,1,1]", "mlp_ratios=[1,1,1,1]", "size=custom", "drop_path=0.1")
    words = [f"model.{size}" for size in sizes]
    method = method_of(load_tune_recipe("groupmixformer_mobile_in1k", words))
    objective: Any = method.build()
    method.exports(tmp_path)["official"].write(objective, str(tmp_path / "out.pth"))
    assert set(torch.load(tmp_path / "out.pth", weights_only=True)) == {"model"}
    other: Any = method.build()
    other.load_pretrained(str(tmp_path / "out.pth"), read_raw(str(tmp_path / "out.pth")))
    state = objective.model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in other.model.state_dict().items())


@pytest.mark.parametrize(("way", "crosses"), [("all_ranks", True), ("rank", False)])
def test_the_engine_is_told_whose_rows_batch_norms_see(way: str, crosses: bool) -> None:
    recipe = load_tune_recipe("groupmixformer_mobile_in1k", [f"model.batch_norm={way}"])
    assert build_on_meta(method_of(recipe)).cross_rank_batch_norm is crosses


@pytest.mark.parametrize(
    ("name", "trained", "steps", "weight_decay"),
    [("groupmixformer_b_upernet_ade20k", 75_747_148, 160_000, 0.01), ("vit_b_linear_ade20k", 116_886, 40_000, 1e-4)],
)
def test_recipes_of_segmentation(name: str, trained: int, steps: int, weight_decay: float) -> None:
    method = method_of(load_tune_recipe(name))
    assert problems_of(method) == []
    recipe: Any = method.recipe
    size = count_model(method)
    assert (size.trained, recipe.schedule.steps, recipe.optim.weight_decay) == (trained, steps, weight_decay)
    assert (recipe.model.classes, recipe.input.first_class, recipe.batch.samples) == (150, 1, 16)


def test_commands_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that need no data."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/systems/groupmixformer.md").read_text(), re.DOTALL)
    for line in block.splitlines():
        program, script, *words = shlex.split(line)
        assert (program, script) == ("python", "launch/finetune.py") and finetune_main(words) == 0, line
    assert "17.6 GMAC" in capsys.readouterr().out
