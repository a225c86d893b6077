"""CycleACR as a user runs it: trained, judged, stopped and resumed with its memory; two pathways; released weights."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.cycleacr.head_weights import load_start
from finetune.cycleacr.objective import CycleACRObjective, MomentSamples, moments_of
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.errors import WeightsError
from pretrain.objectives.base import method_of, problems_of
from tests.finetune.conftest import Toy
from tests.finetune.test_detection_run import boxed, losses

__all__ = ["boxed"]

HEAD = ("objective.name=cycleacr", "objective.dim=8", "objective.hidden=16", "objective.memory.past=2",
        "objective.memory.future=1", "objective.max_persons=4", "objective.memory.max_per_second=2")  # fmt: skip
#: Words by which the toy recipe gets the backbone of two pathways, or that of windows.
SLOWFAST = ("optim.layer_decay=1", "input.stride=1", "input.pad=16")
SWIN = ("input.pad=32",)
MODELS = {
    SLOWFAST: "{name: slowfast, depth: 50, width: 8, beta: 4, classes: 3, tau: 2, alpha: 2}",
    SWIN: "{name: video_swin, dim: 8, depths: [2, 2], heads: [2, 4], window: [2, 3, 3], classes: 3, drop_path: 0.1}",
}


def recipe_of(boxed: Toy, *words: str) -> TuneRecipe:
    path = boxed.recipe
    for given, model in MODELS.items():
        if words[: len(given)] == given:
            path = boxed.folder / f"{model[7:11]}.yaml"
            path.write_text(f"model: {model}\n" + boxed.recipe.read_text().partition("pretrain_width: 32}\n")[2])
    return load_tune_recipe(str(path), [*HEAD, *words])


def built(boxed: Toy, *words: str) -> CycleACRObjective:
    """The objective of the toy recipe, with weights of which none is zero."""
    recipe = recipe_of(boxed, *words)
    method = method_of(recipe)
    assert not problems_of(method)
    torch.manual_seed(1)
    objective = method.build()
    assert isinstance(objective, CycleACRObjective)
    for name, value in objective.model.head.named_parameters():
        torch.nn.init.normal_(value, std=0.3 if name.endswith("weight") else 0.1)
    return objective


def batches(objective: CycleACRObjective, count: int = 3) -> list[dict[str, Any]]:
    """Made-up clips of neighbouring seconds of one video."""
    samples = MomentSamples(objective.recipe.input, 0, 3)
    made = [samples.example(2) for _ in range(count)]
    for number, batch in enumerate(made):
        batch["moments"] = ([7, 7], [900 + 2 * number, 901 + 2 * number], batch["moments"][2])
    return made


def test_a_stopped_run_goes_on_with_its_memory(boxed: Toy) -> None:
    words = (*HEAD, "evaluate.test=none", "checkpoint.every_steps=1")
    boxed.run("whole", *words)
    boxed.run("parts", *words, "schedule.max_steps=3")
    boxed.run("parts", *words)
    assert losses(boxed, "parts") == losses(boxed, "whole") and len(losses(boxed, "whole")) == 6
    judged = [record for record in boxed.records("whole") if "eval/mAP" in record]
    assert len(judged) == 2 and all(record["eval/keyframes"] == 11 for record in judged)
    folders = [boxed.folder / name / "checkpoints" / "step_00000006" for name in ("whole", "parts")]
    one, two = map(consolidated_state, folders)
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (torch.load(folder / "rank_state" / "rank_00000.pt") for folder in folders)
    assert first.keys() == {"memory", "last_loss"} and len(first["memory"]["tensor"]) > 2000
    assert all(torch.equal(first[name]["tensor"], second[name]["tensor"]) for name in first)


def test_answers_depend_on_the_seconds_around(boxed: Toy) -> None:
    objective = built(boxed).eval()
    made = batches(objective)
    together = objective.detect_all(made)
    assert len(together) == 6
    alone = [answer for batch in made for answer in objective.detect_all([batch])]
    assert any((abs(one.scores - two.scores) > 1e-4).any() for one, two in zip(together, alone, strict=True))


def test_a_stream_that_knows_no_future_is_the_two_phases(boxed: Toy) -> None:
    objective = built(boxed, "objective.memory.future=0").eval()
    made = batches(objective)
    # As samples without moments come: seconds and videos are then read from the batch itself.
    for number, batch in enumerate(made):
        del batch["moments"]
        batch |= {"videos": ["film"] * 2, "times": torch.tensor([900.0, 901.0]) + 2 * number}
    streamed = [answer for batch in made for answer in objective.detect(batch)]
    objective.forget()
    for one, two in zip(objective.detect_all(made), streamed, strict=True):
        torch.testing.assert_close(torch.from_numpy(one.scores), torch.from_numpy(two.scores))


@pytest.mark.parametrize("words", [SLOWFAST, SWIN, ("model.tokens.keep_rate=0.5", "model.tokens.blocks=[1]"), ()])
def test_training_remembers_what_was_applied(boxed: Toy, words: tuple[str, ...]) -> None:
    objective = built(boxed, *words).train()
    (batch,) = batches(objective, 1)
    objective.before_step(0, 1, 1)
    objective(batch).loss.backward()
    without = [name for name, value in objective.named_parameters() if value.grad is None]
    assert not [name for name in without if "head" in name], without
    objective.before_step(0, 1, 1)
    objective.after_step()
    assert len(objective.bank) == 0, "the step was left out"
    loss = objective(batch).loss
    objective.after_step()
    assert len(objective.bank) == 6 and float(objective.last_loss) == pytest.approx(float(loss.detach()))


def test_keyframes_between_whole_seconds_have_a_second_each() -> None:
    times = torch.tensor([0.5, 1.5, 2.5, 902.0, 903.96], dtype=torch.float64)
    batch = {"times": times, "videos": ["a"] * 5, "counts": torch.ones(5, dtype=torch.int64)}
    assert moments_of(batch).seconds == [0, 1, 2, 902, 903]


def test_rates_and_decay_of_the_iteration_trainer(boxed: Toy) -> None:
    words = ("objective.head_scale=10", "objective.bias_scale=2", "objective.decay_positions=false")
    objective = built(boxed, *SLOWFAST, *words)
    rules = {name: objective.rule(name, value.shape) for name, value in objective.named_parameters()}
    module = "model.head.feature_extractor.cycleacr_module."
    found = {
        name: (rules[name].lr_scale, rules[name].decays)
        for name in (
            f"{module}actor_dim_reduce.weight", f"{module}actor_dim_reduce.bias",
            f"{module}cycle_modeling.local_temporal_position", "model.head.feature_extractor.fc1.weight",
            "model.head.predictor.cls_score.bias", "model.slow.conv1.weight", "model.fast.Tconv1.conv.bias",
        )
    }  # fmt: skip
    assert list(found.values()) == [(10, True), (20, False), (10, False), (1, True), (2, False), (1, True), (2, False)]


def test_rates_and_decay_of_windows(boxed: Toy) -> None:
    """Tables of biases are biases, as by the official "bias" in the name; layers count where the recipe asks for it."""
    words = ("objective.bias_scale=2", "objective.decay_positions=false", "optim.layer_decay=0.5")
    assert not problems_of(method_of(recipe_of(boxed, *SWIN, *words)))
    objective = built(boxed, *SWIN, *words)
    rules = {name: objective.rule(name, value.shape) for name, value in objective.named_parameters()}
    block = "model.layers.1.blocks.1"
    found = [
        (rules[name].lr_scale, rules[name].decays)
        for name in (
            f"{block}.attn.relative_position_bias_table", f"{block}.attn.qkv.weight", f"{block}.norm1.bias",
            "model.patch_embed.proj.weight", "model.head.feature_extractor.fc1.weight",
        )
    ]  # fmt: skip
    assert found == [(1, False), (0.5, True), (1, False), (0.5**5, True), (1, True)]


class _Pool:
    """Stands for the memory in released files."""


def released(objective: CycleACRObjective, path: Path, name: str) -> None:
    """Write weights as they are released, a pickled memory beside them."""
    state = {}
    for key, value in objective.model.state_dict().items():
        key = key.replace("head.", "roi_heads.action.", 1) if key.startswith("head.") else f"backbone.{key}"
        state[key] = value.clone()[..., None, None, None] if "cycleacr_module" in key else value.clone()
    _Pool.__module__ = name
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        sys.modules[".".join(parts[:count])] = types.ModuleType(".".join(parts[:count]))
    sys.modules[name]._Pool = _Pool  # type: ignore[attr-defined]
    torch.save({"model": state, "iteration": 3, "person_pool": _Pool()}, path)
    for count in range(1, len(parts) + 1):
        del sys.modules[".".join(parts[:count])]


@pytest.mark.parametrize("words", [SLOWFAST, SWIN])
def test_released_weights_are_taken_without_their_memory(boxed: Toy, tmp_path: Path, words: tuple[str, ...]) -> None:
    first, second = built(boxed, *words), built(boxed, *words)
    for value in (*second.model.parameters(), *second.model.buffers()):
        value.data.zero_()
    released(first, tmp_path / "official.pth", "alphaction.structures.memory_pool")
    load_start(second.model, str(tmp_path / "official.pth"))
    other = second.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.model.state_dict().items())
    released(first, tmp_path / "foreign.pth", "somebody.else_s")
    with pytest.raises(WeightsError, match="somebody.else_s"):
        load_start(second.model, str(tmp_path / "foreign.pth"))
    deeper = built(boxed, *words, "objective.depth=2")
    with pytest.raises(WeightsError, match="without head.*depth"):
        load_start(deeper.model, str(tmp_path / "official.pth"))
    load_start(deeper.model, str(tmp_path / "official.pth"), "new")


def test_a_classifier_of_windows_is_a_start(boxed: Toy, tmp_path: Path) -> None:
    """As Video Swin's are released: behind `backbone.`, with numbers of places and a head of other classes."""
    first, second = built(boxed, *SWIN), built(boxed, *SWIN)
    weights = first.model.state_dict()
    state = {f"backbone.{name}": value.clone() for name, value in weights.items() if not name.startswith("head.")}
    assert len(state) > 50
    state |= {f"backbone.layers.{stage}.blocks.{block}.attn.relative_position_index": torch.zeros(18, 18).long()
              for stage in range(2) for block in range(2)}  # fmt: skip
    state |= {"cls_head.fc_cls.weight": torch.ones(5, 16), "cls_head.fc_cls.bias": torch.ones(5)}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "swin.pth")
    report = load_start(second.model, str(tmp_path / "swin.pth"))
    assert all(name.startswith("head.") for name in report.missing) and len(report.matched) == len(state) - 6
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(first.model.get_parameter(name), second.model.get_parameter(name))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("objective.outputs=7",), "objective.outputs=7, allowed with objective.fusion=add: 48"),
        (("objective.depth=0",), "objective.depth=0, allowed: 1 or more"),
        (("objective.memory.rate=0",), "objective.memory.rate=0, allowed: 1 or more"),
        (("zero.stage=3",), "zero.stage=3, allowed with objective cycleacr"),
        ((*SLOWFAST, "optim.layer_decay=0.9"), "optim.layer_decay=0.9, allowed with model.name=slowfast: 1"),
    ],
)
def test_options_that_can_not_be_are_named(boxed: Toy, words: tuple[str, ...], told: str) -> None:
    found = problems_of(method_of(recipe_of(boxed, *words)))
    assert any(told in one for one in found), found


@pytest.mark.parametrize("name", ["vit_l_cycleacr_ava", "slowfast_r101_cycleacr_ava", "swin_b_cycleacr_ava"])
def test_the_recipes_can_be_built(name: str) -> None:
    method = method_of(load_tune_recipe(name))
    assert not problems_of(method)
    assert method.cost().macs["head"] > 1e7
