"""Gradients of every ZeRO stage with activations kept, recomputed, or recomputed in part, against stage 0.

Biases and scales are those of a trained network: with zero biases, as a network begins, wrong gradients look right.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.objectives.base import method_of
from pretrain.recipe.load import load_recipe

RECOMPUTE = ("false", "true", "selective")
#: A step of plain descent, so that the change of the weights is the gradient.
STEP = (
    "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip_grad=null", "optim.base_lr=1",
    "optim.base_batch=8", "schedule.warmup_epochs=0", "schedule.max_steps=1",
)  # fmt: skip


def name_of(stage: int, recompute: str, compiled: bool = False) -> str:
    return f"gradient {stage} {recompute}" + (" compiled" if compiled else "")


def plan(cases: list[tuple[int, str, bool]], weights: Path, ranks: int) -> dict[str, Any]:
    """Runs of one step each. Stage 3 comes last, and there what keeps activations: DeepSpeed's linear stays, see
    test_ranks.py."""
    return {
        name_of(*case): {
            "overrides": [
                *STEP,
                f"batch.micro={8 // ranks}",
                f"run.init_weights={weights}",
                f"zero.stage={case[0]}",
                f"compute.activation_checkpointing={case[1]}",
                f"compute.compile={str(case[2]).lower()}",
            ]
        }
        for case in sorted(cases, key=lambda case: (case[0], case[1] == "false"))
    }


@pytest.fixture(scope="module")
def weights(toy: Any) -> Path:
    """A network whose biases and scales are not those of its initialisation."""
    model = method_of(load_recipe(str(toy.recipe))).build().model
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data += 0.3 * torch.randn(value.shape, generator=generator)
    path: Path = toy.folder / "trained.pth"
    torch.save(model.state_dict(), path)
    return path


def gradient(toy: Any, name: str, before: dict[str, torch.Tensor]) -> torch.Tensor:
    after = consolidated_state(toy.folder / name / "checkpoints" / "step_00000001")
    return torch.cat([(before[key] - after[f"model.{key}"]).flatten() for key in before]).detach()


def compare(toy: Any, weights: Path, cases: list[tuple[int, str, bool]], ranks: int = 1) -> dict[str, float]:
    """Relative error of each case's gradient against the first one's."""
    assert set(toy.drive(plan(cases, weights, ranks), ranks=ranks).values()) == {0}
    before = torch.load(weights)
    wanted = gradient(toy, name_of(*cases[0]), before)
    assert wanted.norm() > 0.01
    found = {name_of(*case): gradient(toy, name_of(*case), before) for case in cases[1:]}
    return {name: ((one - wanted).norm() / wanted.norm()).item() for name, one in found.items()}


def test_recomputation_changes_no_gradient(toy: Any, weights: Path) -> None:
    stages = [(0, RECOMPUTE), (1, ("false", "selective")), (3, RECOMPUTE)]
    cases = [(stage, recompute, False) for stage, kinds in stages for recompute in kinds]
    errors = compare(toy, weights, cases)
    assert len(errors) == 7 and max(errors.values()) < 1e-4, errors


@pytest.mark.faults
def test_compiling_changes_no_gradient(toy: Any, weights: Path) -> None:
    cases = [(2, "false", False)] + [(stage, recompute, True) for stage in (2, 3) for recompute in ("false", "true")]
    errors = compare(toy, weights, cases, ranks=2)
    assert len(errors) == 4 and max(errors.values()) < 1e-3, errors
