"""EVAD as a task: matching, answers, rules, recipes, and training as a user runs it."""

import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from finetune.evad import set_matching, task
from finetune.evad.selection import select_persons
from finetune.evad.set_losses import action_loss, mean_of_terms, person_loss, set_losses
from finetune.evad.set_matching import AnnotatedPersons, assign, giou_continuous, match_all
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.errors import RecipeError
from pretrain.models.evad.context import ActorPredictions
from pretrain.models.weight_files import read_raw
from pretrain.objectives.base import method_of, problems_of
from pretrain.plan.dry_run import dry_run
from pretrain.plan.trace import trace_step
from pretrain.runtime.process_group import Ranks
from tests.finetune.conftest import Toy
from tests.finetune.test_detection_run import keyframe
from tests.toy_shards import index, write_shard

RECIPE = """\
model: {name: evad, size: custom, patch_size: 8, dim: 48, depth: 4, heads: 2, mlp_ratio: 2, classes: 3, drop_path: 0,
        pretrain_side: 64, keep_rate: 0.8, queries: 8, rcnn_heads: 2, query_dim: 24, query_heads: 2, query_hidden: 48,
        dynamic_dim: 8, pool_size: 3, action_pool_size: 3, decoder_dim: 24, decoder_depth: 2, decoder_heads: 2,
        decoder_drop_path: 0, action_hidden: 32}
objective: {name: evad}
input: {frames: 4, stride: 2, short_side: 48, flip: 0, pad: 16, max_boxes: 8}
data:
  sources: {toy: {shards: FOLDER/train, val: FOLDER/val}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {base_lr: 1e-3, base_batch: 8, layer_decay: 1}
schedule: {epochs: 2, warmup_epochs: 0.5}
evaluate: {every_epochs: 1, micro: 3, workers: 0}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 2, keep_last: 1}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""
#: Published rows: keep rate, keyframe weight, learning rate, videos a step, weight of actions.
PUBLISHED = {
    "vit_b_evad_ava": (0.7, 1.0, 2.5e-5, 16, 12.0),
    "vit_b_evad_ava_unpruned": (1.0, 1.0, 2.5e-5, 16, 12.0),
    "vit_b_evad_ava_060": (0.6, 4.0, 2.5e-5, 16, 12.0),
    "vit_b_evad_ava_v2": (0.7, 1.0, 2.5e-5, 16, 12.0),
    "vit_l_evad_ava": (0.7, 1.0, 1e-5, 8, 6.0),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("evad")
    for split, numbers in (("train", range(24)), ("val", range(100, 107))):
        (folder / split).mkdir()
        write_shard(folder / split / "s-000000.tar", map(keyframe, numbers))
    index(folder / "train", folder / "val")
    recipe = folder / "toy.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return Toy(recipe, folder)


def recipe_of(found: Toy, *words: str) -> TuneRecipe:
    return load_tune_recipe(str(found.recipe), list(words))


def test_trains_judges_and_tests(found: Toy) -> None:
    found.run("whole", "ema.decay=0.5", "model.drop_path=0.1")
    records = found.records("whole")
    steps = {record["step"]: record for record in records if "train/loss" in record}
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    assert {"train/loss_ce", "train/loss_giou", "train/loss_bbox", "train/loss_bce"} <= set(steps[1])
    assert all(record["eval/keyframes"] == 7 for record in records if "eval/mAP" in record)
    scores = json.loads((found.folder / "whole" / "predictions" / "step_00000006" / "scores.json").read_text())
    assert {"mAP", "mAP (slowfast)"} <= set(scores) and scores["keyframes"] == 7


def one_batch(found: Toy, *words: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    method = method_of(recipe_of(found, *words))
    return method.build().eval(), method.example(2)


def test_keyframe_without_a_sure_person_answers_with_all(found: Toy) -> None:
    objective, batch = one_batch(found, "objective.person_threshold=1")
    answers = objective.detect(batch)
    assert [len(one.boxes) for one in answers] == [8, 8] and answers[0].scores.shape == (8, 3)
    assert all(0 <= one.boxes.min() and one.boxes.max() <= 1 for one in answers)


def test_padding_is_zero_behind_the_normalisation(found: Toy) -> None:
    objective, batch = one_batch(found)
    batch["sizes"][0] = torch.tensor([32, 40])
    seen = []
    objective.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    batch["video"][0, :, 32:] = 255
    objective.predictions(batch)
    assert not seen[0][0, :, 32:].any() and not seen[0][0, :, :, 40:].any() and seen[0][1, :, 32:].any()


def test_loss_of_a_batch_without_persons_has_a_gradient(found: Toy) -> None:
    """A rank whose clips have nobody must still answer in the reduction of gradients."""
    objective, batch = one_batch(found)
    batch |= {"boxes": batch["boxes"][:0], "labels": batch["labels"][:0], "counts": torch.zeros(2, dtype=torch.int64)}
    output = objective(batch)
    output.loss.backward()
    assert output.loss.isfinite() and float(output.metrics["loss_bce"]) == 0
    assert all(one.grad is not None for one in objective.parameters())


def test_keyframes_with_nobody_on_them_are_for_who_finds_persons(found: Toy) -> None:
    assert not problems_of(method_of(recipe_of(found, "input.empty=keep")))
    (problem,) = problems_of(method_of(load_tune_recipe("vit_s_ava", ["input.empty=keep"])))
    assert problem.startswith("input.empty: found keep, allowed: refuse; without a person objective.name=detection")


def test_boxes_are_measured_by_the_persons_of_all_ranks(found: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = one_batch(found)
    alone = objective(batch)
    two = Ranks(0, 2, 0, torch.device("cpu"))
    monkeypatch.setattr(task, "present_ranks", lambda device: two)
    # The other rank has twice as many: the share is 1.5 times what this one has.
    monkeypatch.setattr(task, "mean", lambda value, ranks: value * 1.5 if ranks is two else value)
    together = objective(batch)
    assert_close(together.metrics["loss_giou"], alone.metrics["loss_giou"] / 1.5)
    assert_close(together.metrics["loss_bbox"], alone.metrics["loss_bbox"] / 1.5)
    assert_close(together.metrics["loss_ce"], alone.metrics["loss_ce"])


def test_boxes_that_are_not_finite_give_a_loss_that_guards_see(found: Toy) -> None:
    objective, batch = one_batch(found)
    for value in ("nan", "inf"):
        with torch.no_grad():
            objective.model.init_proposal_boxes.weight.fill_(float(value))
        assert not objective(batch).loss.isfinite()


def test_rates_of_what_is_new(found: Toy) -> None:
    objective, _ = one_batch(found, "optim.layer_decay=0.5")
    rules = {name.removeprefix("model."): objective.rule(name, one.shape) for name, one in objective.named_parameters()}
    assert rules["det_head.s0_headseries.0.linear1.weight"].lr_scale == 8
    assert rules["det_head.decoder.blocks.0.attn.qkv.weight"].lr_scale == 8
    assert rules["fpn_lateral2.weight"].lr_scale == rules["init_proposal_boxes.weight"].lr_scale == 1
    assert rules["blocks.3.mlp.fc1.weight"].lr_scale == 0.5 and rules["patch_embed.proj.weight"].lr_scale == 0.5**5
    assert not rules["det_head.mask_token"].decays and not rules["blocks.0.attn.q_bias"].decays
    assert rules["init_proposal_boxes.weight"].decays and not rules["norm.weight"].decays


def boxes_of(*corners: tuple[float, ...]) -> Tensor:
    return torch.tensor(corners)


def test_generalised_iou() -> None:
    first = boxes_of((0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 10, 10))
    second = boxes_of((0, 0, 10, 10), (10, 0, 20, 10), (5, 0, 15, 10))
    assert_close(giou_continuous(first, second), torch.tensor([1.0, 0.0, 1 / 3]))
    assert float(giou_continuous(boxes_of((0, 0, 1, 1)), boxes_of((9, 9, 10, 10)))) == pytest.approx(2 / 100 - 1)


def two_clips() -> tuple[ActorPredictions, AnnotatedPersons]:
    """Two clips of 100 x 100 and 200 x 100; the second's boxes lie where the first's persons are, and vice versa."""
    here, there = (10.0, 10, 40, 60), (60.0, 20, 90, 80)
    boxes = torch.stack((boxes_of(there, here, (0, 0, 5, 5)), boxes_of((0, 0, 5, 5), there, here)))
    logits = torch.zeros(2, 3, 2)
    found = ActorPredictions([logits, logits], [boxes, boxes], [torch.zeros(2, 3, 4)])
    labels = torch.eye(4)[:3]
    counts, sizes = torch.tensor([2, 1]), torch.tensor([[100, 100], [200, 100]])
    return found, AnnotatedPersons(boxes_of(here, there, here), labels, counts, sizes)


def test_persons_are_matched_in_their_own_clips() -> None:
    found, persons = two_clips()
    for one in match_all(found.person_logits, found.boxes, persons):
        pairs = sorted(zip(one.persons.tolist(), one.clips.tolist(), one.proposals.tolist(), strict=True))
        assert pairs == [(0, 0, 1), (1, 0, 0), (2, 1, 2)]


def test_losses_of_a_perfect_answer() -> None:
    found, persons = two_clips()
    terms = set_losses(found, persons, torch.tensor(3.0), 12.0)
    assert set(terms) == {"loss_ce", "loss_ce_0", "loss_giou", "loss_giou_0", "loss_bbox", "loss_bbox_0", "loss_bce"}
    for name in ("loss_giou", "loss_bbox", "loss_giou_0", "loss_bbox_0"):
        assert_close(terms[name], torch.zeros(()), atol=1e-6, rtol=0)
    half = torch.tensor(2.0).log()
    assert_close(terms["loss_ce"], 2 * half)
    assert_close(terms["loss_bce"], 12 * half)
    assert_close(mean_of_terms(terms), (4 * half + 12 * half) / 7)


def test_more_persons_than_proposals_are_matched_as_far_as_they_go() -> None:
    proposals, persons = assign(torch.rand(5, 3).numpy(), [5, 0])
    assert sorted(proposals) == [0, 1, 2] and len(set(persons)) == 3


def test_weights_of_persons_and_of_nothing() -> None:
    found, persons = two_clips()
    matches = match_all(found.person_logits, found.boxes, persons)[-1]
    logits = torch.zeros(2, 3, 2)
    logits[0, 2, 1] = 100.0  # sure that nothing is there: one of three such proposals costs nothing
    expected = (3 * 1.0 + 2 * 0.1) * torch.tensor(2.0).log() / (3 * 1.0 + 3 * 0.1)
    assert_close(person_loss(logits, matches), expected)
    empty = dataclasses.replace(
        matches, clips=matches.clips[:0], proposals=matches.clips[:0], persons=matches.clips[:0]
    )
    assert float(action_loss(torch.zeros(2, 3, 4), persons.labels, empty)) == 0


def test_answers_are_inside_frames_and_not_weighted_by_persons() -> None:
    found, persons = two_clips()
    logits = torch.tensor([[[2.0, 0], [0, 2], [2, 0]], [[0, 2], [0, 2], [0, 2]]])
    boxes = found.boxes[0].clone()
    boxes[0, 0] = torch.tensor([-9.0, 20, 130, 140])
    answer = select_persons(ActorPredictions([logits], [boxes], found.action_logits), persons.sizes, 0.7)
    assert answer.counts == [2, 3], "all of the clip without a person"
    assert_close(answer.boxes[0], torch.tensor([0.0, 20, 99, 99]))
    assert_close(answer.scores, torch.full((5, 4), 0.5))


def test_missing_scipy_is_told_before_the_run(found: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError("No module named 'scipy'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    told = "needs scipy .No module named 'scipy'.: pip install 'tubelet\\[detection\\]'"
    assert any("pip install 'tubelet[detection]'" in line for line in set_matching.assignment_problems())
    with pytest.raises(RecipeError, match=told):
        assign(torch.rand(1, 3).numpy(), [1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["objective.action_weight=0"], "objective.action_weight: found 0.0, allowed: more than 0"),
        (["objective.person_threshold=2"], "objective.person_threshold: found 2.0, allowed: from 0 to 1"),
        (["input.max_boxes=9"], "input.max_boxes: found 9, allowed: up to model.queries=8"),
        (["input.pad=8", "input.short_side=40"], "frames of 40 x 72 pixels: multiples of 16"),
        (["tune.method=linear"], "objective.name=evad does not read this section"),
    ],
)
def test_what_can_not_work_is_told(found: Toy, words: list[str], told: str) -> None:
    try:
        problems = problems_of(method_of(recipe_of(found, *words)), 1)
    except RecipeError as error:
        problems = error.problems
    assert any(told in line for line in problems), problems


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_recipes(name: str) -> None:
    rate, weight, lr, samples, actions = PUBLISHED[name]
    recipe = load_tune_recipe(name)
    assert problems_of(method_of(recipe)) == []
    values = {row.strip(): value for section in reversed(dry_run(method_of(recipe))) for row, value, _ in section.rows}
    assert float(values["peak"]) == pytest.approx(lr)
    assert (recipe.model.keep_rate, recipe.model.keyframe_weight) == (rate, weight)
    assert (recipe.batch.samples, recipe.objective.action_weight) == (samples, actions)
    assert list(recipe.model.roi_extension) == ([0, 0] if rate == 1 else [0.4, 0.2])
    assert recipe.schedule.milestones == [5, 8] and recipe.optim.weight_decay == 1e-4


def test_plan_counts_a_step_without_content(found: Toy) -> None:
    method = method_of(recipe_of(found))
    trace, cost = trace_step(method, 2), method.cost()
    # Scores of tokens are computed beside fused attention, and pooling is no part of published counts.
    assert 2 * cost.published <= trace.forward_flops / 2 <= 2.6 * cost.published


def test_released_layout_of_a_run(found: Toy, tmp_path: Path) -> None:
    """What the guide's export writes starts a detector again."""
    objective, _ = one_batch(found)
    path = str(tmp_path / "evad.pth")
    method_of(recipe_of(found)).exports(tmp_path)["evad"].write(objective, path)
    other, _ = one_batch(found)
    with torch.no_grad():
        other.model.norm.weight.fill_(5)
    other.load_pretrained(path, read_raw(path))
    assert torch.equal(other.model.norm.weight, objective.model.norm.weight)
