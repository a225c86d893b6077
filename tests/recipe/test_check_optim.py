"""Checks of optimiser and schedule: one clear message a mistake, and a line for every key that does nothing."""

from typing import get_args, get_type_hints

import pytest

from pretrain.recipe.check import check_recipe, recipe_warnings
from pretrain.recipe.check_optim import SHAPE_KEYS
from pretrain.recipe.load import load_recipe
from pretrain.recipe.optimisers import OPTIMISERS, describe_optimiser
from pretrain.recipe.schema import Optim

STEPS = "schedule.shape=steps schedule.epochs=10"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (f"{STEPS} schedule.milestones=[5,10]", "schedule.milestones: 10 is not less than schedule.epochs = 10"),
        (f"{STEPS} schedule.milestones=[5,5]", "schedule.milestones: found [5.0, 5.0], allowed: rising numbers"),
        (f"{STEPS} schedule.milestones=[0,5]", "schedule.milestones: found [0.0, 5.0], allowed: rising numbers"),
        (f"{STEPS} schedule.milestones=[]", "schedule.milestones: found [], allowed: rising numbers"),
        (STEPS, "none is given"),
        (f"{STEPS} schedule.milestones=[5] schedule.milestone_steps=[50]", "both are given"),
        (f"{STEPS} schedule.steps=40 schedule.milestone_steps=[50]", "50 is not less than schedule.steps = 40"),
        (f"{STEPS} schedule.milestones=[5] schedule.gamma=-0.1", "schedule.gamma: found -0.1, allowed: more than 0"),
        ("schedule.steps=40 schedule.warmup_steps=40", "schedule.warmup_steps: 40 is not less than schedule.steps"),
        ("schedule.epochs=10 schedule.warmup_epochs=10", "schedule.warmup_epochs: 10 is not less than schedule.epochs"),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps: found -1, allowed: 0 or more"),
        ("schedule.warmup_steps=9 schedule.stepping=epoch", "schedule.warmup_steps: the rate changes with each epoch"),
        ("schedule.warmup_epochs=1.5 schedule.stepping=epoch", "schedule.warmup_epochs: found 1.5, allowed"),
        ("schedule.decay_from_epoch=300", "schedule.decay_from_epoch: 300 is not less than schedule.epochs"),
        ("schedule.decay_from_epoch=-1", "schedule.decay_from_epoch: found -1.0, allowed: 0 or more"),
        ("schedule.lag=-1", "schedule.lag: found -1, allowed: 0 or more"),
        ("schedule.steps=0", "schedule.steps: found 0, allowed: more than 0"),
        ("optim.base_warmup_lr=1", "optim.base_warmup_lr: 1 is more than optim.base_lr"),
        ("optim.base_min_lr=1 schedule.shape=linear", "and the schedule goes down"),
        (
            "optim.base_batch=128 optim.scaled=peak optim.base_min_lr=1e-5 optim.base_lr=1e-4",
            "(with optim.scaled=peak: 1e-05 and 6.25e-06)",
        ),
        ("optim.name=sgd optim.momentum=0 optim.nesterov=true", "optim.nesterov: true, and optim.momentum is 0"),
        ("optim.name=sgd optim.momentum=1", "optim.momentum: found 1.0, allowed: a number from 0 to below 1"),
        ("optim.name=lars zero.stage=2", "zero.stage: found 2, allowed with optim.name=lars: 0"),
        ("optim.name=lars zero.stage=0 optim.trust=0", "optim.trust: found 0.0, allowed: more than 0"),
        ("optim.weight_decay=0 optim.weight_decay_end=0.1", "optim.weight_decay_end: 0.1, and optim.weight_decay is 0"),
    ],
)
def test_mistake_is_one_message(words: str, expected: str) -> None:
    (problem,) = check_recipe(load_recipe("demo", words.split()))
    assert expected in problem


@pytest.mark.parametrize("shape", ["cubic", "Cosine"])
def test_unknown_shape_names_those_there_are(shape: str) -> None:
    with pytest.raises(Exception, match="allowed: one of cosine, linear, steps, constant"):
        load_recipe("demo", [f"schedule.shape={shape}"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("optim.name=adam optim.momentum=0.8", ["optim.momentum has no effect: optim.name is adam"]),
        ("optim.name=adamw optim.nesterov=true", ["optim.nesterov has no effect: optim.name is adamw"]),
        ("optim.name=sgd optim.eps=1e-6 optim.trust=0.1", ["optim.eps has no effect", "optim.trust has no effect"]),
        ("optim.name=lars optim.nesterov=true zero.stage=0", ["optim.nesterov has no effect: optim.name is lars"]),
        ("schedule.milestones=[5]", ["schedule.milestones has no effect: schedule.shape is cosine"]),
        (f"{STEPS} schedule.milestones=[5] schedule.decay_from_epoch=1", ["schedule.decay_from_epoch has no effect"]),
        ("schedule.shape=constant schedule.gamma=0.3", ["schedule.gamma has no effect: schedule.shape is constant"]),
        ("schedule.steps=100", ["schedule.epochs has no effect: schedule.steps is set"]),
        ("schedule.warmup_steps=5", ["schedule.warmup_epochs has no effect: schedule.warmup_steps is set"]),
        ("schedule.warmup_epochs=0 schedule.warmup_ends=end", ["schedule.warmup_ends has no effect: there is no warm"]),
        ("optim.scaled=none", ["optim.base_batch has no effect: optim.scaled is none"]),
    ],
)
def test_key_without_effect_is_a_warning(words: str, expected: list[str]) -> None:
    # The demo's own words that this shape or scaling doesn't read are taken back to the defaults first.
    plain = ["optim.base_min_lr=1e-5", "optim.betas=[0.9,0.95]"]
    found = recipe_warnings(load_recipe("demo", [*plain, *words.split()]))
    assert len(found) == len(expected), found
    assert all(start in line for start, line in zip(expected, found, strict=True)), found


def test_tables_name_keys_and_values_that_there_are() -> None:
    recipe = load_recipe("demo")
    from pretrain.engine.optimiser import CLASSES
    from pretrain.engine.schedules import SHAPES

    assert set(OPTIMISERS) == set(CLASSES) == set(get_args(get_type_hints(Optim)["name"]))
    assert set(SHAPE_KEYS) == set(SHAPES)
    for key in {key for keys in SHAPE_KEYS.values() for key in keys}:
        section, _, name = key.partition(".")
        assert hasattr(getattr(recipe, section), name), key
    assert all(hasattr(recipe.optim, key) for kind in OPTIMISERS.values() for key in kind.keys)


def test_an_optimiser_is_told_with_what_it_reads() -> None:
    def told(words: str) -> str:
        return describe_optimiser(load_recipe("demo", words.split()).optim)

    assert told("optim.name=adamw optim.momentum=0.5") == "AdamW"
    assert told("optim.name=sgd optim.momentum=0.5 optim.nesterov=true") == "SGD (momentum 0.5, Nesterov's)"
    assert told("optim.name=lars optim.nesterov=true") == "LARS (momentum 0.9, trust 0.001)"
