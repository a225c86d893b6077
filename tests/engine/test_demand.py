"""How many data workers a rank starts where the recipe leaves it open, and what that is checked against."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain.data.workers import data_workers
from pretrain.engine import demand
from pretrain.engine.demand import Demand, demand_of
from pretrain.engine.start_checks import check_limits
from pretrain.objectives.base import Method, method_of
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Data
from pretrain.recipe.show import show_recipe
from pretrain.runtime import host_checks
from pretrain.runtime.cores import CoreShare
from pretrain.runtime.process_group import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
GB = 10**9


def method(*words: str) -> Method:
    return method_of(load_recipe("vit_b_dual", ["data.root=x", "batch.micro=8", "input.views=1", *words]))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[CoreShare, float], None]:
    """A host with these cores, and bytes free in /dev/shm."""

    def make(share: CoreShare, free: float) -> None:
        usage = shutil_usage(int(free))
        monkeypatch.setattr(demand, "share_cores", lambda ranks: share)
        monkeypatch.setattr(host_checks.shutil, "disk_usage", lambda folder: usage)

    return make


def shutil_usage(free: int) -> Any:
    return dataclasses.make_dataclass("Usage", ["free"])(free)


@pytest.mark.parametrize(
    ("asked", "cores", "room", "given"),
    [(None, 6, None, 6), (None, 6, 4, 4), (None, 6, 0, 1), (None, 0, None, 1), (0, 6, 4, 0), (12, 6, 4, 12)],
)
def test_workers_follow_the_cores_where_no_number_is_given(
    asked: int | None, cores: int, room: int | None, given: int
) -> None:
    assert data_workers(Data(workers=asked), cores, room) == given


def test_they_are_told_once_and_the_recipe_stays_portable(
    machine: Callable[[CoreShare, float], None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(CoreShare(12, 2, 6), 100 * GB)
    chosen = method()
    with caplog.at_level(logging.INFO):
        assert demand_of(chosen, ALONE).workers == 6
        assert demand_of(chosen, dataclasses.replace(ALONE, rank=1, world_size=2)).workers == 6
    assert caplog.messages == ["data.workers: 6 for each rank: 12 cores of this host / 2 ranks"]
    assert "  workers: null " in show_recipe(chosen.recipe)


def test_a_number_stays_and_is_not_told(
    machine: Callable[[CoreShare, float], None], caplog: pytest.LogCaptureFixture
) -> None:
    machine(CoreShare(2, 1, 2), 100 * GB)
    with caplog.at_level(logging.INFO):
        assert demand_of(method("data.workers=9"), ALONE).workers == 9
    assert not caplog.messages


def test_shared_memory_follows_workers_prefetch_and_batch(
    machine: Callable[[CoreShare, float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Those of all ranks of the host; where it is short, fewer are started, and a number that was given is refused."""
    clip = 16 * 224 * 224 * 3
    machine(CoreShare(24, 2, 12), 100 * GB)
    full = demand_of(method(), ALONE)
    assert full.workers == 12 and 2 * 2 * 8 * clip < full.bytes_each < 2 * 2 * 8 * clip * 1.01
    assert demand_of(method("data.prefetch=4", "batch.micro=4"), ALONE).bytes_each == full.bytes_each
    machine(CoreShare(24, 2, 12), 1.25 * 5 * full.bytes_each + 1)
    short = demand_of(method(), ALONE)
    assert short == Demand(5, full.bytes_each)
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "5 for each rank: 24 cores of this host / 2 ranks; /dev/shm has no room" in warning
    assert "--shm-size" in warning
    for chosen, status in ((method(), "ok"), (method("data.workers=12"), "fail")):
        found = {one.check: one for one in check_limits(chosen, ALONE, demand_of(chosen, ALONE))}["shared memory"]
        assert found.status == status
    assert "--shm-size=2g" in found.advice and "data.workers=5" in found.advice
