"""Every published row of TDN, and TSM's of MGSampler's example, as a sound recipe that says what was published."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from finetune.commands.finetune import main
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.engine.schedules import build_schedule
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import recipe_names

ROOT = Path(__file__).parents[2]

#: Learning rate, batch, epochs, milestones, weight decay, dropout, clips, classes: systems/tdn.md section 6.
DATA: dict[str, tuple[Any, ...]] = {
    "ssv1": (0.01, 64, 60, [30, 45, 55], 5e-4, 0.5, 1, 174),
    "ssv2": (0.01, 64, 60, [30, 45, 55], 5e-4, 0.5, 1, 174),
    "k400": (0.02, 128, 100, [50, 75, 90], 1e-4, 0.5, 10, 400),
    "ucf101": (0.002, 128, 25, [10, 20], 5e-4, 0.8, 1, 101),
    "hmdb51": (0.002, 128, 25, [10, 20], 5e-4, 0.8, 1, 51),
}
SIZES = ("r50_8f", "r50_16f", "r101_8f", "r101_16f")
ROWS = {f"tdn_{size}_{data}" for size in SIZES for data in ("ssv1", "ssv2", "k400")}
ROWS |= {"tdn_r50_16f_ucf101", "tdn_r50_16f_hmdb51"}
TSM = {"tsm_r50_8f_ssv1": (0.01, 64), "tsm_r50_16f_ssv1": (0.01, 48), "tsm_r50_8f_ssv2": (0.0075, 48),
       "tsm_r50_16f_ssv2": (0.0075, 48)}  # fmt: skip


def test_there_is_a_recipe_for_every_row() -> None:
    names = {name for name in recipe_names("finetune") if name.startswith(("tdn_", "tsm_")) and "mgsampler" not in name}
    assert names == ROWS | {*TSM}


def sound(name: str) -> TuneRecipe:
    """A recipe without problems."""
    recipe = load_tune_recipe(name)
    method = method_of(recipe)
    assert problems_of(method) == []
    warnings = [line for line in warnings_of(method) if "no multiple of" not in line]
    assert len(warnings) == 1 and "run.init_weights is null" in warnings[0], warnings
    return recipe


@pytest.mark.parametrize("name", sorted(ROWS))
def test_published_numbers(name: str) -> None:
    _, net, frames, data = name.split("_")
    rate, batch, epochs, milestones, decay, dropout, clips, classes = DATA[data]
    recipe = sound(name)
    # 16 segments: half of the batch at half of the rate; UCF101 and HMDB51 are stated for 16.
    halved = frames == "16f" and data in ("ssv1", "ssv2", "k400")
    assert recipe.batch.samples == batch / (1 + halved)
    schedule = build_schedule(recipe, 10)
    assert schedule.lr(0) == schedule.lr(milestones[0] * 10 - 1) == pytest.approx(rate / (1 + halved))
    assert [schedule.lr(epoch * 10) / schedule.lr(0) for epoch in milestones] == pytest.approx(
        [0.1**power for power in range(1, len(milestones) + 1)]
    )
    assert schedule.total == epochs * 10 and recipe.batch.samples == recipe.batch.micro * recipe.batch.ranks
    optim = recipe.optim
    assert (optim.name, optim.momentum, optim.weight_decay, optim.clip_grad) == ("sgd", 0.9, decay, 20)
    assert (optim.decayed, optim.bias_rate, optim.head_rate, optim.layer_decay) == ("all", 1, 1, 1)
    assert (recipe.model.dropout, recipe.objective.smoothing, recipe.compute.dtype) == (dropout, 0, "fp32")
    assert (recipe.model.depth, recipe.input.segments) == (int(net[1:]), int(frames[:-1]))
    assert recipe.model.classes == classes
    source = next(iter(recipe.data.sources.values()))
    assert (source.sampling, source.flip, source.short_side) == ("sparse", True, 256)
    pairs = [["86", "87"], ["93", "94"], ["166", "167"]]
    assert source.flip_labels == (pairs if data in ("ssv1", "ssv2") else None)
    views = (recipe.evaluate.clips, recipe.evaluate.crops, recipe.evaluate.crop_size)
    three = data == "k400" or (net, data) == ("r101", "ssv2")
    assert views == (clips, 3, 256) if three else (clips, 1, None)
    assert (recipe.input.test_clips, recipe.input.crop, recipe.input.views) == ("random", "multiscale", 1)


@pytest.mark.parametrize("name", TSM)
def test_tsm_of_the_released_example(name: str) -> None:
    """systems/mgsampler.md section 6."""
    recipe = sound(name)
    schedule = build_schedule(recipe, 10)
    assert (schedule.lr(0), recipe.batch.samples) == (pytest.approx(TSM[name][0]), TSM[name][1])
    assert (schedule.total, recipe.schedule.milestones) == (500, [20, 40])
    optim = recipe.optim
    assert (optim.weight_decay, optim.clip_grad, optim.decayed) == (5e-4, 20, "matrices")
    assert (optim.bias_rate, optim.head_rate) == (2, 5)
    assert not next(iter(recipe.data.sources.values())).flip


def test_it_can_be_planned() -> None:
    sections = dry_run(method_of(load_tune_recipe("tdn_r50_8f_ssv1")))
    values = {row.strip(): value for section in reversed(sections) for row, value, _ in reversed(section.rows)}
    assert (values["parameters"], values["forward pass"], values["accumulation"]) == ("24,410,574", "35.6 GMAC", "1")


def test_commands_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    """Checks are run; of ensembles what each command needs is told, in tests/finetune/test_ensemble.py they work."""
    recipes, ensembles = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/systems/tdn.md").read_text(), re.DOTALL)
    for line in recipes.splitlines():
        program, script, *words = shlex.split(line)
        assert (program, script) == ("python", "launch/finetune.py") and main(words) == 0, line
    for line in ensembles.splitlines():
        assert main(shlex.split(line)[2:]) == 1
        assert "runs/tdn_r50_8f_ssv2: no predictions.json" in capsys.readouterr().err


def test_every_recipe_is_in_the_guide() -> None:
    named = set(re.findall(r"`(t[ds][nm]_r\w+)`", (ROOT / "docs/systems/tdn.md").read_text().split("## Segments")[0]))
    assert named == ROWS | {*TSM}
