"""Two updates of one batch, the second seeing the first's result, equal to two plain optimisers in every ZeRO stage."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.engine.turns import turns_of
from pretrain.errors import RecipeError
from pretrain.objectives.base import Objective, Rule
from tests.engine.turns_program import LAYOUTS, RATES, Adversarial, batch

PROGRAM = Path(__file__).with_name("turns_program.py")


def plain(accumulation: int) -> tuple[dict[str, torch.Tensor], list[tuple[float, float]]]:
    """Weights and losses of a loop with an optimiser for each network, as publications of such methods have it."""
    objective, losses = Adversarial(), []
    networks = {name: objective.model[name] for name in objective.turns}
    optimizers = {
        name: torch.optim.Adam(network.parameters(), betas=(0.5, 0.999)) for name, network in networks.items()
    }
    for step, lr in enumerate(RATES):
        row = []
        for turn in objective.turns:
            objective.turn = turn
            objective.zero_grad()
            total = 0.0
            for micro in range(accumulation):
                loss = objective(batch(step, micro)).loss / accumulation
                loss.backward()
                total += float(loss)
            optimizers[turn].param_groups[0]["lr"] = lr * (2.0 if turn == "generator" else 1.0)
            optimizers[turn].step()
            row.append(total)
        losses.append((row[0], row[1]))
    return {key: value.detach() for key, value in objective.named_parameters()}, losses


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("turns") / "found.pt"
    done = subprocess.run([sys.executable, str(PROGRAM), str(output)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    content: dict[str, Any] = torch.load(output)
    return content


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " ".join(map(str, layout)))
def test_turns_are_two_plain_optimisers(found: dict[str, Any], layout: tuple[int, str, int]) -> None:
    weights, losses = plain(layout[2])
    run = found[" ".join(map(str, layout))]
    near = {"rtol": 0.1, "atol": 0.05} if layout[1] == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    for key, value in weights.items():
        torch.testing.assert_close(run["weights"][key], value, **near)
    torch.testing.assert_close(torch.tensor(run["losses"]), torch.tensor(losses), **near)
    assert run["applied"] == [True] * len(RATES)
    assert run["fetched"] == len(RATES) * layout[2], "the second turn sees the first's batch, not another one"


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
