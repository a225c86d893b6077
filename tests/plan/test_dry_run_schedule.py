"""The dry run prints every schedule as numbers."""

import pytest

from pretrain.errors import RecipeError
from pretrain.objectives.base import method_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.load import load_recipe


def rows(words: str) -> dict[str, tuple[str, str]]:
    sections = dry_run(method_of(load_recipe("vit_s_v1_k400", words.split())))
    chosen = [section for section in sections if section.title in ("learning rate", "schedule")]
    return {name.strip(): (value, remark) for section in chosen for name, value, remark in section.rows}


def test_milestones_and_rates_that_do_not_scale() -> None:
    found = rows("optim.scaled=none schedule.shape=steps schedule.milestones=[50,90] schedule.epochs=100 input.views=2")
    assert found["peak"] == ("0.00015", "not scaled with the batch")
    assert "end" not in found and "warm-up from" not in found
    per = int(found["steps an epoch"][0])
    assert found["shape"] == ("steps", f"x 0.1 at steps {50 * per:,}, {90 * per:,}")
    at = {name: value for name, (value, _) in found.items() if name.startswith("learning rate at")}
    assert at[f"learning rate at step {50 * per - 1:,}"] == "0.00015"
    assert at[f"learning rate at step {50 * per:,}"] == "1.5e-05"
    assert at[f"learning rate at step {100 * per - 1:,}"] == "1.5e-06"
    assert found["epochs"] == ("100", "200 effective, with 2 views")


def test_warm_up_from_a_value_and_a_late_cosine_by_epoch() -> None:
    found = rows(
        "optim.base_warmup_lr=1e-5 schedule.decay_from_epoch=0 schedule.stepping=epoch schedule.lag=1 "
        "schedule.epochs=100 schedule.warmup_epochs=10"
    )
    assert found["warm-up from"][0] == "4e-05" and "1e-05 x 1,024 videos / 256" in found["warm-up from"][1]
    assert found["warm-up steps"][1] == "linear from 4e-05"
    assert found["shape"] == ("cosine", "begins at step 0; changes with each epoch; 1 epoch(s) late")
    assert found["learning rate at step 0"][0] == "4e-05"


def test_weight_decay_where_it_varies() -> None:
    words = "schedule.steps=1000 schedule.warmup_steps=100"
    assert not any(name.startswith("weight decay") for name in rows(words))
    found = rows(f"{words} optim.weight_decay=0.04 optim.weight_decay_end=0.4")
    assert "epochs" not in found and found["steps"][0] == "1,000" and found["steps"][1].endswith(" epochs")
    assert [found[f"weight decay at step {step}"][0] for step in (0, 500)] == ["0.04", "0.22"]
    assert float(found["weight decay at step 999"][0]) == pytest.approx(0.4, rel=1e-3)


def test_an_epoch_that_makes_no_step_says_how_many_samples_it_has() -> None:
    source = ["data.sources.camera=null", "data.sources.actions.expected_samples=57", "data.root=/nowhere"]
    recipe = load_recipe("demo", [*source, "batch.samples=128", "batch.micro=64"])
    with pytest.raises(RecipeError, match=r"takes 128 samples, more than an epoch has \(56\)"):
        dry_run(method_of(recipe))
