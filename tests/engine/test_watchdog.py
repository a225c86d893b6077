"""Hangs of real ranks: stacks of all, who is to blame, and an end; nobody is left behind."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import kill_session, start_ranks
from tests.toy_run import DRIVER

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = (
    *("schedule.epochs=20", "checkpoint.every_steps=3", "data.workers=1", "zero.stage=1"),
    "watchdog.leave_s=2",
)
#: A machine with other work must not look like a hang of its own.
SHORT = ("watchdog.least_s=3", "watchdog.stop_after_s=5", "watchdog.beat_s=1")
PATIENCE_S = 300


class Pair:
    """Two ranks without a launcher, as on two hosts: nobody but themselves ends one when the other is gone."""

    def __init__(self, toy: Any, name: str, accidents: list[list[Any]] | None, *overrides: str) -> None:
        self.folder = toy.folder / name
        plan = toy.folder / f"{name}.json"
        words = [toy.run_dir(name), *OPTIONS, *overrides]
        plan.write_text(json.dumps([{"overrides": words, "accidents": accidents}]))
        command = [str(DRIVER), str(toy.recipe), str(plan)]
        if accidents is None:
            command = [str(ROOT / "launch" / "pretrain.py"), "--recipe", str(toy.recipe), *words]
        self.ranks = start_ranks(command, 2)

    def alive(self, rank: int) -> list[int]:
        """Processes of a rank, data workers among them, that have not ended."""
        return list(session(self.ranks[rank].pid))

    def close(self) -> None:
        for rank in self.ranks:
            kill_session(rank)


def session(leader: int) -> dict[int, str]:
    """Command lines by process of a session; what has ended does not count."""
    found = subprocess.run(["ps", "-ww", "-o", "pid=,stat=,args=", "-s", str(leader)], capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    return {int(pid): command for pid, state, command in lines if not state.startswith("Z")}


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def pair(toy: Any) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(name: str, accidents: list[list[Any]] | None, *overrides: str) -> Pair:
        made.append(Pair(toy, name, accidents, *overrides))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_rank_that_hangs_is_named_and_both_leave_with_their_stacks(pair: Any) -> None:
    hung = pair("hung", [[8, 1, "hang"]], *SHORT)
    outputs = [rank.communicate(timeout=PATIENCE_S)[0] for rank in hung.ranks]
    assert [rank.returncode for rank in hung.ranks] == [75, 75], outputs
    said = [line for output in outputs for line in output.splitlines() if "hang: step 8" in line]
    assert len(said) == 1, outputs
    assert "1 of 2 ranks are behind" in said[0] and "rank 1 (host " in said[0] and "forward of step 8" in said[0]
    names = sorted(path.name for path in (hung.folder / "stacks").iterdir())
    assert names == [
        "collectives_step_00000008",
        *("rank_00000_step_00000008.txt", "rank_00000_worker_0.txt"),
        *("rank_00001_step_00000008.txt", "rank_00001_worker_0.txt"),
    ]
    assert ": data: " in (hung.folder / "stacks" / names[2]).read_text(), "which sample the worker is at"
    assert "in accident" in (hung.folder / "stacks" / names[3]).read_text()
    assert "agreement.py" in (hung.folder / "stacks" / names[1]).read_text()
    records = [json.loads(path.read_text()) for path in (hung.folder / "stacks" / names[0]).iterdir()]
    assert len(records) == 2 and all(record["entries"] for record in records), "the last collectives of each rank"
    assert json.loads((hung.folder / "hangs.jsonl").read_text())["step"] == 8
    wait_until(lambda: not hung.alive(0) and not hung.alive(1))


@pytest.mark.faults
def test_a_frozen_host_is_named_and_repeated_hangs_end_with_1(pair: Any, toy: Any) -> None:
    folder = toy.folder / "frozen"
    folder.mkdir()
    (folder / "hangs.jsonl").write_text(json.dumps({"from_step": 0}) + "\n")
    frozen = pair("frozen", [[2, 0, "SIGSTOP"]], *SHORT, "watchdog.max_restarts=1", "watchdog.stop_after_s=60")
    output = frozen.ranks[1].communicate(timeout=PATIENCE_S)[0]
    assert frozen.ranks[1].returncode == 1, output
    assert "1 of 2 ranks no longer write their heartbeat" in output and "rank 0 (host" in output


@pytest.mark.parametrize(
    ("accident", "said"),
    [
        pytest.param([4, 0, "SIGKILL"], "", marks=pytest.mark.faults),  # the next one dies of it, too
        ([3, 1, "kill while hashing"], "could not clean up within"),  # rank 0 waits for its hashes
        (
            [4, 1, "kill a data worker"],
            "DataError: rank 1: a data worker died",
        ),  # agreed on; toy_driver.py prints
    ],
)
def test_the_death_of_a_rank_or_worker_ends_all_ranks_and_workers(pair: Any, accident: list[Any], said: str) -> None:
    left = pair(str(accident[2]), [accident])
    other = left.ranks[1 - accident[1]]
    output = other.communicate(timeout=PATIENCE_S)[0]
    assert said in output and (other.returncode != 0 or "DataError" in said), output
    wait_until(lambda: not left.alive(0) and not left.alive(1))


def test_a_rank_that_dies_before_the_ranks_have_met_ends_the_other(pair: Any) -> None:
    left = pair("early", None, "watchdog.join_s=3")
    left.ranks[1].kill()
    output = left.ranks[0].communicate(timeout=PATIENCE_S)[0]
    assert left.ranks[0].returncode not in (0, None) and "rank 0 of 2" in output and "could not meet" in output, output


@pytest.mark.parametrize("when", ["before the ranks have met", pytest.param("in training", marks=pytest.mark.faults)])
def test_nothing_outlives_a_killed_launcher(toy: Any, when: str) -> None:
    """The one that a person starts in training, and the one that it starts on each host before."""
    launcher = toy.start(f"launcher {when}", *OPTIONS, ranks=2)
    try:
        if when == "in training":
            toy.wait_for(f"launcher {when}", 2, launcher)
            os.kill(launcher.pid, signal.SIGKILL)
        else:
            wait_until(lambda: of_host(launcher.pid))
            os.kill(of_host(launcher.pid)[0], signal.SIGKILL)
        wait_until(lambda: not session(launcher.pid))
    finally:
        toy.kill(launcher) if session(launcher.pid) else launcher.communicate()


def of_host(front_end: int) -> list[int]:
    """The launcher that `deepspeed` has started for this host, once that has started its ranks."""
    children = {pid: command for pid, command in session(front_end).items() if "--master_port" in command}
    started = any("pretrain.py" in command and "--local_rank" in command for command in session(front_end).values())
    return [pid for pid in children if pid != front_end] if started else []
