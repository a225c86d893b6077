"""Hangs of real ranks: stacks of all, who is to blame, and an end; nobody is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = (
    *("schedule.epochs=20", "checkpoint.every_steps=3", "data.workers=1", "zero.stage=1"),
    *("watchdog.least_s=4", "watchdog.stop_after_s=6", "watchdog.beat_s=1", "watchdog.leave_s=5"),
)
PATIENCE_S = 120


class Pair:
    """Two ranks without a launcher, as on two hosts: nobody but themselves ends one when the other is gone."""

    def __init__(self, toy: Any, name: str, accidents: list[list[Any]], *overrides: str) -> None:
        self.folder = toy.folder / name
        plan = toy.folder / f"{name}.json"
        entry = {"overrides": [toy.run_dir(name), *OPTIONS, *overrides], "accidents": accidents}
        plan.write_text(json.dumps([entry]))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        driver = str(Path(__file__).with_name("driver.py"))
        self.ranks = [
            subprocess.Popen(
                [sys.executable, driver, str(toy.recipe), str(plan)],
                env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank in ("0", "1")
        ]

    def alive(self, rank: int) -> list[int]:
        """Processes of a rank, data workers among them, that have not ended."""
        found = subprocess.run(
            ["ps", "-o", "pid=,stat=", "-s", str(self.ranks[rank].pid)], capture_output=True, text=True
        )
        lines = [line.split() for line in found.stdout.splitlines()]
        return [int(pid) for pid, state in lines if not state.startswith("Z")]

    def close(self) -> None:
        for rank in self.ranks:
            try:
                os.killpg(rank.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def pair(toy: Any) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(name: str, accidents: list[list[Any]], *overrides: str) -> Pair:
        made.append(Pair(toy, name, accidents, *overrides))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_rank_that_hangs_is_named_and_both_leave_with_their_stacks(pair: Any) -> None:
    hung = pair("hung", [[8, 1, "hang"]])
    outputs = [rank.communicate(timeout=PATIENCE_S)[0] for rank in hung.ranks]
    assert [rank.returncode for rank in hung.ranks] == [75, 75], outputs
    said = [line for output in outputs for line in output.splitlines() if "hang: step 8" in line]
    assert len(said) == 1, outputs
    assert "1 of 2 ranks are behind" in said[0] and "rank 1 (host " in said[0] and "forward of step 8" in said[0]
    names = sorted(path.name for path in (hung.folder / "stacks").iterdir())
    assert names == [
        *("rank_00000_step_00000008.txt", "rank_00000_worker_0.txt"),
        *("rank_00001_step_00000008.txt", "rank_00001_worker_0.txt"),
    ]
    assert "in accident" in (hung.folder / "stacks" / names[2]).read_text()
    assert "in agree" in (hung.folder / "stacks" / names[0]).read_text()
    assert json.loads((hung.folder / "hangs.jsonl").read_text())["step"] == 8
    wait_until(lambda: not hung.alive(0) and not hung.alive(1))


def test_a_frozen_host_is_named_and_repeated_hangs_end_with_1(pair: Any, toy: Any) -> None:
    folder = toy.folder / "frozen"
    folder.mkdir()
    (folder / "hangs.jsonl").write_text(json.dumps({"from_step": 0}) + "\n")
    frozen = pair("frozen", [[2, 0, "SIGSTOP"]], "watchdog.max_restarts=1", "watchdog.stop_after_s=60")
    output = frozen.ranks[1].communicate(timeout=PATIENCE_S)[0]
    assert frozen.ranks[1].returncode == 1, output
    assert "1 of 2 ranks no longer write their heartbeat" in output and "rank 0 (host" in output


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_rank_ends_the_other_and_all_workers(pair: Any, victim: int) -> None:
    left = pair(f"dead {victim}", [[6, victim, "SIGKILL"]])
    other = left.ranks[1 - victim]
    output = other.communicate(timeout=PATIENCE_S)[0]
    assert other.returncode not in (0, None), output
    wait_until(lambda: not left.alive(0) and not left.alive(1))
