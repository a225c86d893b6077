"""The guard's decisions, as arithmetic: what is a spike, which budget ends a run, what a resumed guard decides."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.errors import CheckpointError
from pretrain.guards.results import StepResult, history_of
from pretrain.guards.skipped_steps import guard_state, remember, state_at_start
from pretrain.guards.step_guard import GuardState, Spike, StepGuard
from pretrain.objectives.base import method_of, warnings_of
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Guard
from pretrain.runtime.process_group import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def filled(losses: list[float], **options: Any) -> StepGuard:
    """A guard whose window holds some losses."""
    return StepGuard(Guard(window=len(losses), **options), GuardState({"": losses}))


@pytest.mark.parametrize("seed", range(5))
def test_a_spike_is_measured_in_deviations_that_single_outliers_do_not_move(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = (2 + 0.1 * rng.standard_normal(101)).tolist()
    guard = filled(losses, spike="skip", z=8.0)
    assert all(guard.limit().spike(2 + 0.1 * float(value)) is None for value in rng.standard_normal(50))
    found = guard.limit().spike(4.0)
    assert found is not None and 14 < found.z < 28, "20 deviations, as far as 101 samples tell"
    outliers = filled([*losses[:91], *[1000.0] * 10], spike="skip", z=8.0)
    spread = outliers.limit().spike(4.0)
    assert spread is not None and spread.z > 10
    # A rule in deviations does not know the unit of the loss.
    scaled = filled([value * 1e3 for value in losses], spike="skip", z=8.0).limit().spike(4e3)
    assert scaled is not None and math.isclose(scaled.z, found.z, rel_tol=1e-9)


def test_what_is_no_spike() -> None:
    losses = [1.0] * 20
    assert filled(losses, z=5.0).limit().spike(1.0049) is None, (
        "a loss that never moved: a thousandth of it is its deviation"
    )
    assert filled(losses, z=5.0).limit().spike(1.0051) is not None
    assert filled(losses, z=5.0).limit().spike(0.0) is None
    assert (
        filled(losses, z=5.0).limit().spike(math.nan) is None and filled(losses, z=5.0).limit().spike(math.inf) is None
    )
    assert filled(losses, z=5.0, spike="ignore").limit().spike(9.0) is None
    assert filled([0.0] * 4, z=5.0).limit().spike(1.0) is None, "no deviation at all"
    options = Guard(window=10, z=5.0)
    assert StepGuard(options, GuardState({"": [1.0] * 4})).limit().spike(9.0) is None
    assert StepGuard(options, GuardState({"": [1.0] * 5})).limit().spike(9.0) is not None


def test_only_updates_enter_the_window() -> None:
    guard = StepGuard(Guard(window=3))
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0, 5.0], start=1):
        applied = loss != 4.0
        guard.decide(step, StepResult({"loss": loss}, {"": loss} if applied else {}, applied=applied))
    assert guard.state.windows == {"": [2.0, 3.0, 5.0]}


def test_turns_are_judged_by_their_own_losses_and_named() -> None:
    """A critic's loss of 1 and a translator's of 50, as each of them usually is."""
    guard = StepGuard(Guard(window=4, spike="skip", nonfinite="skip"))
    sound = {"critic": 1.0, "translator": 50.0}
    for step in range(1, 5):
        assert all(guard.limit(turn).spike(loss) is None for turn, loss in sound.items())
        assert guard.decide(step, StepResult({"loss": 50.0}, sound)) is None
    metrics = {"loss_critic": 60.0, "loss": 60.0}
    spike = guard.limit("critic").spike(60.0)
    decision = guard.decide(5, StepResult(metrics, applied=False, turn="critic", spike=spike))
    assert decision is not None and decision.what.startswith("the loss of turn critic, 60, is a spike: ")
    metrics = {"loss_critic": 1.1, "loss_translator": math.nan, "loss": math.nan}
    bad = StepResult(metrics, {"critic": 1.1}, False, applied=False, turn="translator", updated=("critic",))
    decision = guard.decide(6, bad)
    assert decision is not None
    assert decision.what == "the loss of turn translator (after the update of critic) is not finite"
    assert guard.state.windows == {"critic": [1.0, 1.0, 1.0, 1.1], "translator": [50.0] * 4}
    assert guard.state.in_a_row == 2, "a step whose last update is left out counts as one without"
    assert history_of("", "") == "" and history_of("k710", "critic") == "k710 / critic"


def test_fp16_overflow_is_the_loss_scale_s_work_until_it_is_spent() -> None:
    guard = StepGuard(Guard(nonfinite="stop"))
    overflow = StepResult({"loss": 1.0}, applied=False, loss_scale=256.0)
    assert guard.decide(1, overflow) is None and guard.state.skipped == 0
    decision = guard.decide(2, replace(overflow, loss_scale=1.0))
    assert decision is not None and (decision.kind, decision.action) == ("gradient", "stop")


@pytest.mark.parametrize("policy", ("skip", "lower_lr", "rewind"))
def test_every_policy_ends_when_no_step_gets_through(policy: Any) -> None:
    guard = StepGuard(Guard(nonfinite=policy, max_skips=3))
    bad = StepResult({"loss": math.nan}, finite_loss=False, applied=False)
    decisions = [guard.decide(step, bad) for step in range(1, 5)]
    assert [decision and decision.action for decision in decisions] == [policy, policy, policy, "stop"]
    assert decisions[-1] is not None and "4 steps in a row" in decisions[-1].reason


@pytest.mark.parametrize(("policy", "used"), [("lower_lr", "lowered"), ("rewind", "rewinds")])
def test_a_policy_may_be_used_so_often_in_a_run(policy: Any, used: str) -> None:
    bad = StepResult({"loss": 9.0}, applied=False, spike=Spike(1.0, 0.1, 80.0))
    for spent, action in ((1, policy), (2, "stop")):
        guard = StepGuard(Guard(spike=policy, max_lowered=2, max_rewinds=2), GuardState(**{used: spent}))
        decision = guard.decide(5, bad)
        assert decision is not None and (decision.asked, decision.action) == (policy, action)


def test_a_rewind_takes_the_checkpoint_s_state_but_keeps_budgets_and_left_out_steps() -> None:
    guard = StepGuard(Guard(leave_out=3), GuardState({"": [9.0]}, in_a_row=1, rewinds=1, skipped_steps=[2]))
    guard.rewound(GuardState({"": [1.0]}, skipped=4, lowered=2, lowered_left=5), step=9, target=7)
    assert guard.state == GuardState(
        {"": [1.0]}, in_a_row=0, skipped=4, lowered=2, lowered_left=5, rewinds=2, skipped_steps=[2, 7, 8]
    )
    assert [step for step in range(12) if guard.leaves_out(step)] == [2, 7, 8]


@pytest.mark.parametrize("seed", range(3))
def test_a_guard_from_a_checkpoint_decides_as_the_one_that_went_on(seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = Guard(spike="lower_lr", nonfinite="skip", window=8, z=4.0, lower_lr_steps=3, max_lowered=99)

    def advance(guard: StepGuard, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            loss = losses[step]
            spike = guard.limit().spike(loss)
            applied = math.isfinite(loss) and not spike
            result = StepResult({"loss": loss}, {"": loss} if applied else {}, math.isfinite(loss), applied)
            decision = guard.decide(step + 1, replace(result, spike=spike))
            if decision is not None and decision.action == "lower_lr":
                guard.lower()
            seen.append((spike, decision and decision.action, guard.lr(1.0)))
        return seen

    losses = (1 + 0.1 * rng.standard_normal(120)).tolist()
    for place, value in zip(rng.permutation(120)[:12], [5.0] * 8 + [math.nan] * 4, strict=True):
        losses[place] = value
    whole = StepGuard(options)
    expected = advance(whole, range(120))
    assert {action for _, action, _ in expected} == {None, "skip", "lower_lr"}, "or nothing is proven"
    first = StepGuard(options)
    half = advance(first, range(61))
    second = StepGuard(options, guard_state({"guard": json.loads(json.dumps(first.saved()))}))
    assert half + advance(second, range(61, 120)) == expected
    assert second.state == whole.state


def test_left_out_steps_survive_a_kill_before_the_next_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    saved = {"guard": GuardState({"": [1.0]}, rewinds=1, skipped_steps=[3]).__dict__}
    remember(path, GuardState(rewinds=2, skipped_steps=[3, 8]))
    state = state_at_start(path, ALONE, saved)
    assert (state.rewinds, state.skipped_steps, state.windows) == (2, [3, 8], {"": [1.0]})
    for other in ({"step": 3}, {"guard": {"rewinds": 1, "left_out": [3]}}):
        with pytest.raises(CheckpointError, match="with the version that began it"):
            state_at_start(path, ALONE, other)
    path.write_text('{"rewinds": ')
    with pytest.raises(CheckpointError, match="remove it"):
        state_at_start(path, ALONE, saved)
    assert state_at_start(path, ALONE, None) == GuardState() and not path.exists(), "a run that starts anew"


def test_options_of_policies_that_are_not_used_are_told() -> None:
    recipe = load_recipe("vit_b_dual", ["guard.leave_out=3", "guard.lower_lr_steps=9", "guard.spike=lower_lr"])
    told = [line for line in warnings_of(method_of(recipe)) if line.startswith("guard.")]
    assert told == ["guard.leave_out has no effect: neither guard.nonfinite nor guard.spike is rewind"]
