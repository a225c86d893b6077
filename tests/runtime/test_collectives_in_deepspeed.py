"""A loss over the global batch in real DeepSpeed engines on two ranks, against plain torch in one process."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pretrain.runtime.process_group import Ranks

PROGRAM = Path(__file__).with_name("deepspeed_program.py")
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location(PROGRAM.stem, PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[int, int, str], Any]]:
    """What two ranks found, by ZeRO stage, number of micro-batches and type."""
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), *map(str, STAGES)],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"2-{rank}.pt") for rank in range(2)]


def plain(program: ModuleType, accumulation: int) -> dict[str, Any]:
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
@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_on_two_ranks_are_those_of_one(
    program: ModuleType, found: list[dict[tuple[int, int, str], Any]], stage: int, accumulation: int
) -> None:
    expected = plain(program, accumulation)
    assert len(set(expected["losses"])) == 3
    for one in found:
        trained = one[stage, accumulation, "fp32"]
        assert trained["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        for kind in ("weights", "buffers"):
            assert trained[kind].keys() == expected[kind].keys()
            for name, value in trained[kind].items():
                assert torch.allclose(value, expected[kind][name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_follows_within_its_rounding(
    program: ModuleType, found: list[dict[tuple[int, int, str], Any]], stage: int
) -> None:
    """Stage 1 has another optimiser there; the comparison's own layer gets rows of the weights' type."""
    expected = plain(program, 2)
    for one in found:
        trained = one[stage, 2, "bf16"]
        assert trained["losses"] == pytest.approx(expected["losses"], rel=0.03)
        moved = {name: value for name, value in expected["weights"].items() if name != "model.0.bias"}
        for name, value in moved.items():
            assert torch.allclose(trained["weights"][name], value, atol=0.03), name
        assert trained["buffers"]["model.1.running_mean"].dtype == torch.float32
