"""Recipes of pictures load, are sound, can be planned, and say what was published of DeiT and EViT."""

import math
from collections import Counter
from typing import Any

import pytest

from finetune.recipe import load_tune_recipe
from pretrain.engine.schedules import build_schedule
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import recipe_names
from pretrain.runtime.vision_ops import ensure_torchvision

#: Keep rate, whether tokens are fused, GMAC, parameters, peak rate, rows a step, epochs: systems/evit.md 2.2, 4 and 5.
PUBLISHED: dict[str, tuple[float, bool, str, int, float, int, int]] = {
    "deit_s_in1k": (1.0, True, "4.6 GMAC", 22_050_664, 1e-3, 1024, 300),
    "deit_b_in1k": (1.0, True, "17.6 GMAC", 86_567_656, 1e-3, 1024, 300),
    "deit_s_evit_090_in1k": (0.9, True, "4.0 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_080_in1k": (0.8, True, "3.5 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_in1k": (0.7, True, "3.0 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_060_in1k": (0.6, True, "2.6 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_050_in1k": (0.5, True, "2.3 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_090_dropped_in1k": (0.9, False, "4.0 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_080_dropped_in1k": (0.8, False, "3.4 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_070_dropped_in1k": (0.7, False, "3.0 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_060_dropped_in1k": (0.6, False, "2.6 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_s_evit_050_dropped_in1k": (0.5, False, "2.3 GMAC", 22_050_664, 2e-3, 2048, 300),
    "deit_b_evit_in1k": (0.7, True, "11.6 GMAC", 86_567_656, 2e-3, 2048, 300),
    "deit_s_evit_tuned_in1k": (0.7, True, "3.0 GMAC", 22_050_664, 8e-5, 2048, 30),
    "deit_s_evit_050_tuned_in1k": (0.5, True, "2.3 GMAC", 22_050_664, 8e-5, 2048, 30),
}
TUNED = [name for name in PUBLISHED if name.endswith("_tuned_in1k")]


def planned(recipe: Any) -> dict[str, str]:
    sections = dry_run(method_of(recipe))
    return {row.strip(): value for section in reversed(sections) for row, value, _ in reversed(section.rows)}


def test_there_is_a_recipe_for_every_row() -> None:
    assert {name for name in recipe_names("finetune") if name.startswith("deit_")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    rate, fuse, gmacs, parameters, peak, rows, epochs = PUBLISHED[name]
    recipe = load_tune_recipe(name)
    assert problems_of(method_of(recipe)) == []
    warnings = [line for line in warnings_of(method_of(recipe)) if "no multiple of" not in line]
    assert len(warnings) == 1 and "run.init_weights is null" in warnings[0]
    tokens, values = recipe.model.tokens, planned(recipe)
    assert (tokens.keep_rate, tokens.fuse, values["forward pass"]) == (rate, fuse, gmacs)
    assert int(values["parameters"].replace(",", "")) == parameters and values["accumulation"] == "1"
    assert float(values["peak"]) == pytest.approx(peak, rel=1e-3)
    # Three views of each picture make no whole 1,024 or 2,048 rows.
    assert recipe.batch.samples * recipe.input.views == pytest.approx(rows, rel=0.01)
    assert recipe.data.epoch_samples * recipe.input.views == 1_281_167 // 256 * 256
    assert (recipe.input.interpolation, recipe.input.evaluated_side, recipe.input.height) == ("bicubic", 256, 224)
    assert (recipe.augment.randaugment, recipe.augment.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (recipe.augment.mixup, recipe.augment.cutmix, recipe.objective.smoothing) == (0.8, 1.0, 0.1)
    tuned = name in TUNED
    assert (recipe.model.drop_path, recipe.optim.weight_decay) == ((0, 1e-6) if tuned else (0.1, 0.05))
    shrinking = (0, 0) if tuned or rate == 1 else (10, 100)
    assert (tokens.start_epoch, tokens.shrink_epochs) == shrinking and recipe.schedule.epochs == epochs


def test_an_epoch_has_the_rows_of_timms_repeated_augmentation() -> None:
    """As many rows of as many pictures, three of each, over all ranks."""
    ensure_torchvision()
    from timm.data.distributed_sampler import RepeatAugSampler

    recipe = load_tune_recipe("deit_s_evit_in1k")
    of_one_rank = RepeatAugSampler(range(1_281_167), num_replicas=8, rank=0, num_repeats=3)
    assert len(of_one_rank) * 8 == recipe.data.epoch_samples * recipe.input.views
    counts = Counter(row for rank in range(8) for row in RepeatAugSampler(range(768), num_replicas=8, rank=rank))
    assert len(counts) * recipe.input.views == 768 and set(counts.values()) == {recipe.input.views}


@pytest.mark.parametrize("name", ["deit_s_in1k", "deit_s_evit_in1k", "deit_s_evit_tuned_in1k"])
def test_rates_are_those_of_timms_scheduler(name: str) -> None:
    """Told the number of the epoch that has ended, as DeiT's trainer tells it."""
    ensure_torchvision()
    import torch
    from timm.scheduler import CosineLRScheduler

    recipe = load_tune_recipe(name)
    peak, epochs = PUBLISHED[name][4], recipe.schedule.epochs
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    warmup = int(recipe.schedule.warmup_epochs)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=int(epochs), lr_min=recipe.optim.base_min_lr, warmup_t=warmup,
        warmup_lr_init=recipe.optim.base_warmup_lr,
    )  # fmt: skip
    ours = build_schedule(recipe, steps_per_epoch=10)
    for epoch in range(int(epochs)):
        assert math.isclose(ours.lr(epoch * 10 + 7), optimizer.param_groups[0]["lr"], rel_tol=1e-9), f"epoch {epoch}"
        scheduler.step(epoch)
