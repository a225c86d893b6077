"""The last collectives of a rank beside its stacks, and nothing where there are none."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretrain.recipe.schema import Watchdog as Options
from pretrain.runtime import flight_recorder, terminal, watchdog
from pretrain.runtime.flight_recorder import dump_collectives, keep_collectives
from pretrain.runtime.process_group import Ranks


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_last_collective_is_in_the_file_of_its_rank(group: None, tmp_path: Path) -> None:
    dist.all_reduce(torch.ones(7))
    path = dump_collectives(tmp_path, 3, 12)
    assert path == tmp_path / "stacks" / "collectives_step_00000012" / "rank_3.json"
    last = json.loads(path.read_text())["entries"][-1]
    assert (last["profiling_name"], last["input_sizes"]) == ("gloo:all_reduce", [[7]])


def test_without_a_group_or_a_recorder_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dump_collectives(tmp_path, 0, 1) is None
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(flight_recorder, "NCCL", ("_no_such_function", ""))
    assert dump_collectives(tmp_path, 0, 1) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {"TORCH_FR_BUFFER_SIZE": "2000"}),
        ({"TORCH_FR_BUFFER_SIZE": "0"}, {"TORCH_FR_BUFFER_SIZE": "0"}),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "50"}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "50"}),
    ],
)
def test_what_the_user_says_of_the_recorder_stays(given: dict[str, str], kept: dict[str, str]) -> None:
    keep_collectives(given)
    assert given == kept


def test_a_record_that_cannot_be_had_holds_up_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, never = threading.Event(), threading.Event()
    monkeypatch.setattr(terminal, "SAY_S", 0.1)
    monkeypatch.setattr(watchdog, "dump_collectives", lambda *_: (asked.set(), never.wait(60)))
    options = Options(enabled=False, long_s=0.01, least_s=0.01)
    watch = watchdog.Watchdog(options, 300.0, tmp_path, Ranks(0, 1, 0, torch.device("cpu")))
    time.sleep(0.05)
    started = time.monotonic()
    watch._look()
    assert asked.is_set() and time.monotonic() - started < 30
    never.set()
