"""A real DeepSpeed engine around a small model, alone in this process, and checkpoints of several ranks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.runtime.process_group import Ranks, join, leave
from tests.ranks import run_ranks

#: What lines begin with that all ranks print alike.
MARKERS = ("LOADED", "CHECKED")


class Layouts:
    """Checkpoints that two ranks have written, and what is found when others read them; see layouts_program.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = self._run(2)
        self._read: dict[tuple[int, int], list[str]] = {}

    def read(self, ranks: int, every: int) -> list[str]:
        """Lines of some ranks that load every n-th of the checkpoints of reshape_program.py, and those of the other."""
        if (ranks, every) not in self._read:
            self._read[ranks, every] = self._run(ranks, 2, every)
        return self._read[ranks, every]

    def _run(self, count: int, *words: int) -> list[str]:
        outputs = run_ranks([Path(__file__).with_name("layouts_program.py"), self.folder, *words], count, timeout_s=400)
        lines = [[line for line in output.splitlines() if line.startswith(MARKERS)] for output in outputs]
        assert all(sorted(one) == sorted(lines[0]) for one in lines), "ranks differ"
        return lines[0]


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    return Layouts(tmp_path_factory.mktemp("layouts"))


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
