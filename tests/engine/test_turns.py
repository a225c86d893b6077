"""Two updates of one batch, the second seeing the first's result, equal to two plain optimisers in every ZeRO stage."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.engine.turns import turns_of
from pretrain.errors import RecipeError
from pretrain.objectives.base import Objective, Rule
from tests.engine.turns_program import LAYOUTS, RATES, Adversarial, Layout, batch


class Plain:
    """A loop with an optimiser for each network, as publications of such methods have it."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.objective = layout, Adversarial()
        self.losses, self.norms, self.applied = list[list[float]](), list[float](), list[bool]()
        self.networks = {name: self.objective.model[name] for name in self.objective.turns}
        self.optimizers = {name: self.optimizer_of(network) for name, network in self.networks.items()}
        for step, lr in enumerate(RATES):
            self.step(step, lr)

    def optimizer_of(self, network: nn.Module) -> torch.optim.Optimizer:
        if self.layout.clip == "null":
            return torch.optim.Adam(network.parameters(), betas=(0.5, 0.999))
        return torch.optim.SGD(network.parameters(), momentum=0.9)

    def step(self, step: int, lr: float) -> None:
        """Up to the turn that went wrong: what follows would see an update that was left out."""
        self.losses.append([math.nan, math.nan])
        for number, turn in enumerate(self.objective.turns):
            if step == 1 and turn == self.layout.bad:
                self.norms.append(math.inf)
                self.applied.append(False)
                return
            self.losses[-1][number] = self.backward(step, turn)
            limit = math.inf if self.layout.clip == "null" else float(self.layout.clip)
            norm = float(torch.nn.utils.clip_grad_norm_(self.networks[turn].parameters(), limit))
            self.optimizers[turn].param_groups[0]["lr"] = lr * (2.0 if turn == "generator" else 1.0)
            self.optimizers[turn].step()
        self.norms.append(norm)
        self.applied.append(True)

    def backward(self, step: int, turn: str) -> float:
        self.objective.turn = turn
        self.objective.zero_grad()
        losses = []
        for micro in range(self.layout.accumulation):
            loss = self.objective(batch(step, micro)).loss / self.layout.accumulation
            loss.backward()
            losses.append(float(loss.detach()))
        return sum(losses)


@pytest.fixture(scope="module")
def found(in_engines: Callable[[str], dict[tuple[int, int], Any]]) -> list[dict[str, Any]]:
    """Of each of two ranks."""
    return list(in_engines("tests.engine.turns_program").values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_turns_are_two_plain_optimisers(found: list[dict[str, Any]], layout: Layout) -> None:
    """Also where a turn's loss is NaN on one rank: it and what follows in that step change nothing on any rank."""
    plain = Plain(layout)
    # bf16 keeps 8 bits; a step that was left out, or taken twice, would move weights by 0.02 at least.
    near = {"rtol": 2**-8, "atol": 0.006} if layout.dtype == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    for one in found:
        run = one[str(layout)]
        for key, value in plain.objective.named_parameters():
            torch.testing.assert_close(run["weights"][key], value.detach(), **near)
        losses = torch.tensor(run["losses"])
        told = torch.tensor(plain.losses).isfinite()
        rounding = 0.02 if layout.dtype == "bf16" else 1e-5
        torch.testing.assert_close(losses[told], torch.tensor(plain.losses)[told], rtol=rounding, atol=0)
        assert losses[~told].isnan().all()
        assert run["applied"] == plain.applied == [True, not layout.bad, True]
        assert run["norms"] == pytest.approx(plain.norms, rel=rounding)
        assert run["fetched"] == len(RATES) * layout.accumulation, "the second turn sees the first's batch, no other"


def test_a_limit_that_clips_nothing_would_prove_nothing() -> None:
    clipped, free = Plain(Layout(0, "fp32", clip="0.8")), Plain(Layout(0, "fp32", clip="1000.0"))
    assert min(clipped.norms) > 0.8
    assert not torch.allclose(clipped.objective.model["generator"].bias, free.objective.model["generator"].bias, 0.05)


def test_wrong_turns_are_named() -> None:
    class Unknown(Adversarial):
        def rule(self, name: str, shape: Any) -> Rule:
            return Rule(turn="critic")

    class Idle(Adversarial):
        def rule(self, name: str, shape: Any) -> Rule:
            return Rule(turn="generator")

    class Single(Unknown):
        turns = ("all",)

    with pytest.raises(RecipeError, match="turn='critic', allowed: discriminator, generator, the turns of Unknown"):
        turns_of(Unknown())
    with pytest.raises(RecipeError, match="turn='critic', allowed: all, the turns of Single"):
        turns_of(Single())
    with pytest.raises(RecipeError, match="without a parameter to update: discriminator"):
        turns_of(Idle())


def test_one_turn_is_left_alone() -> None:
    class Plain(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    (turn,) = turns_of(Plain())
    assert turn.others == () and turn.name == "all"


def test_a_turn_that_is_over_leaves_no_trace() -> None:
    """Also where it ends early: DeepSpeed takes what needs no gradient for frozen, in checkpoints above all."""
    objective = Adversarial()
    for turn in turns_of(objective):
        with pytest.raises(KeyError), turn.taken(objective):
            trained = {name.split(".")[1] for name, value in objective.named_parameters() if value.requires_grad}
            assert trained == {turn.name} == {objective.turn}
            raise KeyError
        assert all(value.requires_grad for value in objective.parameters()) and objective.turn == "all"
