"""A loss over the global batch in real DeepSpeed engines on two ranks, against plain torch in one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain.runtime.process_group import Ranks
from tests.runtime import deepspeed_program as program

Found = list[dict[tuple[int, int, str], Any]]


@pytest.fixture(scope="module")
def found(in_engines: Callable[[str], dict[tuple[int, int], Any]]) -> Found:
    """What two ranks found, by ZeRO stage, number of micro-batches and type."""
    return list(in_engines("tests.runtime.deepspeed_program").values())


def plain(accumulation: int) -> dict[str, Any]:
    """One process, no DeepSpeed, no cache: one graph over the step, batch norm over each micro-batch's global rows."""
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    objective = program.Objective(ranks)
    optimizer = torch.optim.SGD(objective.parameters(), lr=program.LR, momentum=0.9)
    losses = []
    for step in range(program.STEPS):
        parts = [objective.embed(program.micro_batch(step, n, accumulation, ranks)) for n in range(accumulation)]
        loss, _ = objective.compare({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += [float(loss.detach())] * accumulation
    weights = {name: value.detach() for name, value in objective.named_parameters()}
    return {"losses": losses, "weights": weights, "buffers": dict(objective.named_buffers())}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", program.STAGES)
def test_three_steps_on_two_ranks_are_those_of_one(found: Found, stage: int, accumulation: int) -> None:
    expected = plain(accumulation)
    assert len(set(expected["losses"])) == 3
    for one in found:
        trained = one[stage, accumulation, "fp32"]
        assert trained["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        for kind in ("weights", "buffers"):
            assert trained[kind].keys() == expected[kind].keys()
            for name, value in trained[kind].items():
                assert torch.allclose(value, expected[kind][name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_follows_within_its_rounding(found: Found, stage: int) -> None:
    """Stage 1 has another optimiser there; the comparison's own layer gets rows of the weights' type."""
    expected = plain(2)
    for one in found:
        trained = one[stage, 2, "bf16"]
        assert trained["losses"] == pytest.approx(expected["losses"], rel=0.03)
        moved = {name: value for name, value in expected["weights"].items() if name != "model.0.bias"}
        for name, value in moved.items():
            assert torch.allclose(trained["weights"][name], value, atol=0.03), name
        assert trained["buffers"]["model.1.running_mean"].dtype == torch.float32
