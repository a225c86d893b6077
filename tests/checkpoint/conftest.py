"""A real DeepSpeed engine around a small model, alone in this process, and programs on several ranks."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.runtime.process_group import Ranks, join, leave
from tests.ranks import run_ranks


def run_on_ranks(program: Path, count: int, *words: object, marker: str) -> list[str]:
    """Run a program on some ranks; returns its lines that start with `marker`, which all ranks print alike."""
    outputs = run_ranks([program, *words], count)
    lines = [[line for line in output.splitlines() if line.startswith(marker)] for output in outputs]
    assert all(sorted(one) == sorted(lines[0]) for one in lines), "ranks differ"
    return lines[0]


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[str]]:
    """Runs a program on some ranks."""
    return run_on_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank."""
    before = dict(os.environ)
    os.environ["DS_ACCELERATOR"] = "cpu"
    joined = join()
    yield joined
    leave(joined)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def engine(ranks: Ranks) -> Any:
    """A DeepSpeed engine, ZeRO stage 1 in bf16, after one step; about 1.3 MB of state."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.LayerNorm(300))
    config = {
        "train_batch_size": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_force_ds_cpu_optimizer": False,
    }
    made, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    made.backward(made(torch.ones(4, 300, dtype=torch.bfloat16)).sum())
    made.step()
    return made
