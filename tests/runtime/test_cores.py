"""Cores of a host: shared by its ranks, near a rank's device, limited by a container."""

import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.runtime import cores
from pretrain.runtime.cores import (
    CoreShare,
    RankCores,
    bind_threads,
    bind_to_device,
    divide,
    near_cores,
    parse_cores,
    processor_quota,
    usable_cores,
    why_unbound,
)
from pretrain.runtime.process_group import Ranks

GPU = torch.device("cuda", 0)


def ranks_with(*allowed: Sequence[int], host: str = "a", near: Sequence[Sequence[int]] = ()) -> list[RankCores]:
    """Ranks of one host by the cores that each may use, and those near its device."""
    close = near or [()] * len(allowed)
    return [RankCores(host, frozenset(one), frozenset(other)) for one, other in zip(allowed, close, strict=True)]


@pytest.mark.parametrize(
    ("allowed", "own"),
    [
        ([range(12)], [12]),
        ([range(12)] * 2, [6, 6]),
        ([range(12)] * 8, [1] * 8),
        ([range(4)] * 8, [1] * 8),  # more ranks than cores
        ([range(0, 6), range(6, 12)], [6, 6]),  # Slurm gave each rank its own
        ([range(0, 8), range(0, 8), range(8, 12)], [4, 4, 4]),  # as NUMA nodes do
    ],
)
def test_a_hosts_cores_are_divided_among_those_that_may_use_each(allowed: list[range], own: list[int]) -> None:
    # A rank of another host, with the same numbers, takes none of them.
    found = [*ranks_with(*allowed), *ranks_with(range(64), host="b")]
    together = len(set().union(*allowed))
    assert [divide(found, rank) for rank in range(len(allowed))] == [CoreShare(together, len(own), n) for n in own]
    assert divide(found, len(allowed)) == CoreShare(64, 1, 64)


def test_the_limit_of_a_container_is_for_its_ranks_together(tmp_path: Path) -> None:
    assert processor_quota(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert processor_quota(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("650000 100000\n")
    assert processor_quota(tmp_path) == 6.5
    assert divide(ranks_with(range(64), range(64)), 0, 6.5) == CoreShare(6, 2, 3)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1


def test_lists_of_cores() -> None:
    assert parse_cores("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cores("\n") == frozenset()


NODES = (range(0, 8), range(8, 16))
ALL = range(16)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (ranks_with(ALL, ALL, near=NODES), ""),
        (ranks_with(range(0, 4), range(8, 12), near=NODES), ""),  # narrower bounds of Slurm's stay
        (ranks_with(ALL, ALL, near=[NODES[0], NODES[0]]), "not spread over its NUMA nodes"),
        (ranks_with(ALL, near=NODES[:1]), "not spread over its NUMA nodes"),
        (ranks_with(range(8, 12), range(8, 16), near=NODES), "far from its device"),
        (ranks_with(ALL, ALL, near=[NODES[0], ()]), "does not say"),
    ],
)
def test_ranks_are_bound_where_no_core_would_lie_idle(found: list[RankCores], reason: str) -> None:
    said = why_unbound(found, 1 if len(found) > 1 else 0)
    assert reason in said and bool(said) == bool(reason)


def test_what_other_hosts_are_like_decides_nothing_here() -> None:
    found = [*ranks_with(ALL, ALL, near=NODES), *ranks_with(ALL, host="b", near=[()])]
    assert [bool(why_unbound(found, rank)) for rank in range(3)] == [False, False, True]


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of two NUMA nodes, with a GPU at each."""
    for node, (domain, cpulist) in enumerate((("0000:1b:00.0", "0-7"), ("0001:9a:00.0", "8-15"))):
        (tmp_path / f"devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / domain).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / domain / "local_cpulist").write_text(f"{cpulist}\n")

    def properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(pci_domain_id=device.index, pci_bus_id=(0x1B, 0x9A)[device.index or 0], pci_device_id=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return tmp_path


def test_cores_near_a_gpu(sysfs: Path) -> None:
    assert [near_cores(torch.device("cuda", number), sysfs) for number in range(2)] == [set(NODES[0]), set(NODES[1])]
    (sysfs / "bus/pci/devices/0000:1b:00.0/local_cpulist").unlink()
    assert near_cores(GPU, sysfs) == frozenset()
    (sysfs / "devices/system/node/node1").rmdir()
    assert near_cores(torch.device("cuda", 1), sysfs) == frozenset(), "one node: all cores are equally near"


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[int]]:
    """What a rank among two, both allowed all cores of the host, was bound to."""
    found: list[frozenset[int]] = []
    other = RankCores(cores.platform.node(), frozenset(ALL), frozenset(NODES[1]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(ALL))
    monkeypatch.setattr(cores, "gather_objects", lambda ranks, own: [own, other])
    monkeypatch.setattr(cores, "bind_threads", found.append)
    return found


def test_a_rank_is_bound_to_the_cores_near_its_gpu_and_says_so_once(
    sysfs: Path, bound: list[frozenset[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        bind_to_device(Ranks(0, 2, 0, GPU), "device", sysfs)
    assert bound == [set(NODES[0])]
    assert caplog.messages == ["data.affinity: 8 of 16 cores, near cuda:0"]


def test_a_rank_is_left_alone_where_asked_and_where_it_is_no_gpu(sysfs: Path, bound: list[frozenset[int]]) -> None:
    bind_to_device(Ranks(0, 2, 0, GPU), "none", sysfs)
    bind_to_device(Ranks(0, 2, 0, torch.device("cpu")), "device", sysfs)
    assert bound == []


def test_a_host_that_does_not_tell_is_left_alone_with_a_word(
    sysfs: Path, bound: list[frozenset[int]], caplog: pytest.LogCaptureFixture
) -> None:
    (sysfs / "bus/pci/devices/0000:1b:00.0/local_cpulist").unlink()
    with caplog.at_level(logging.INFO):
        bind_to_device(Ranks(0, 2, 0, GPU), "device", sysfs)
    assert bound == [] and "does not say which cores are near each device; left as it is" in caplog.text


def test_threads_and_children_are_bound_too() -> None:
    """In this process, whose cores are given back; a data worker is such a child."""
    before = os.sched_getaffinity(0)
    one, running = frozenset({min(before)}), threading.Event()
    thread = threading.Thread(target=running.wait)
    thread.start()
    try:
        bind_threads(one)
        assert os.sched_getaffinity(thread.native_id or 0) == os.sched_getaffinity(0) == one
        program = "import os; print(os.sched_getaffinity(0))"
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert child.stdout == f"{set(one)}\n"
    finally:
        bind_threads(frozenset(before))
        running.set()
        thread.join()
