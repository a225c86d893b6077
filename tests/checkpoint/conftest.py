"""A real DeepSpeed engine around a small model, alone in this process, and programs on several ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.runtime.process_group import Ranks, join, leave


def run_on_ranks(program: Path, count: int, *words: object, marker: str) -> list[str]:
    """Run a program on some ranks; returns its lines that start with `marker`, which all ranks print alike."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), *map(str, words)],
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)[-8000:]
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
