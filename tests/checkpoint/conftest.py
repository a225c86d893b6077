"""A real DeepSpeed engine around a small model, alone in this process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pretrain.runtime.process_group import Ranks, join, leave


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank."""
    import os

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
