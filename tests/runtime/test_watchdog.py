"""Limits, verdicts and exit codes of the watchdog, on its own; tests/engine/test_watchdog.py has real hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.recipe.schema import Watchdog as Options
from pretrain.runtime import stacks
from pretrain.runtime.activity import note
from pretrain.runtime.heartbeats import Beat, Heartbeats, Seen, behind
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.watchdog import HANGS, Watchdog

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def unwatched(folder: Path, **options: object) -> Watchdog:
    """A watchdog whose thread does not run."""
    return Watchdog(Options(enabled=False, **options), 300.0, folder, ALONE)  # type: ignore[arg-type]


def seen(rank: int, step: int, phase: str, phase_s: float) -> Seen:
    return Seen(Beat("now", 1, rank, "host", 1, step, phase, phase_s, ""), age_s=0.0)


def test_long_work_is_given_time_until_a_step_has_finished_after_it(tmp_path: Path) -> None:
    watchdog = unwatched(tmp_path, least_s=100.0, long_s=1000.0)
    assert watchdog.limit_s == 1000, "the first step may compile"
    watchdog.step_done(1)
    assert watchdog.limit_s == 100
    with watchdog.long("save"):
        assert watchdog.limit_s == 1000
    assert watchdog.limit_s == 1000, "another rank may still be at it, and this one waits in the next step"
    watchdog.step_done(2)
    assert watchdog.limit_s == 100


def test_the_limit_follows_the_median_and_not_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog, now = unwatched(tmp_path, least_s=1.0, factor=5.0), time.monotonic()
    lengths = [1000.0, 20.0, 21.0, 22.0, 500.0]  # the first one is the start's
    for step, length in enumerate(lengths, 1):
        now += length
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        watchdog.step_done(step)
    assert watchdog.limit_s == pytest.approx(5 * 21.5)


def test_storage_may_be_waited_for(tmp_path: Path) -> None:
    assert unwatched(tmp_path).limits.stop_after_s > 300
    assert unwatched(tmp_path, stop_after_s=7.0).limits.stop_after_s == 7


@pytest.mark.parametrize(
    ("hangs", "saved", "on_hang", "expected"),
    [
        ([], False, "requeue", 75),
        ([4, 4], False, "requeue", 75),
        ([4, 4, 4], False, "requeue", 1),
        ([4, 4, 4], True, "requeue", 75),
        ([1, 2, 3], False, "requeue", 75),
        ([], True, "fail", 1),
    ],
)
def test_hangs_without_a_checkpoint_between_them_end_the_job(
    tmp_path: Path, hangs: list[int], saved: bool, on_hang: str, expected: int
) -> None:
    (tmp_path / HANGS).write_text("".join(json.dumps({"from_step": step}) + "\n" for step in hangs))
    watchdog = unwatched(tmp_path, on_hang=on_hang)
    watchdog.begin(4)
    if saved:
        with watchdog.long("save"):
            pass
    assert watchdog.exit_code == expected


@pytest.mark.parametrize(("hangs", "most", "expected"), [(0, 0, 1), (1, 1, 1), (1, 2, 75), (3, 4, 75), (5, 4, 1)])
def test_as_many_restarts_as_the_recipe_says(tmp_path: Path, hangs: int, most: int, expected: int) -> None:
    (tmp_path / HANGS).write_text((json.dumps({"from_step": 4}) + "\n") * hangs)
    watchdog = unwatched(tmp_path, max_restarts=most)
    watchdog.begin(4)
    assert watchdog.exit_code == expected


def test_who_is_behind() -> None:
    waiting = {rank: seen(rank, 7, "all-reduce", 100.0) for rank in range(4)}
    assert behind(waiting) == [], "all wait for each other"
    slow = waiting | {2: seen(2, 7, "data", 90.0), 3: seen(3, 7, "forward", 95.0)}
    assert [one.beat.rank for one in behind(slow)] == [3, 2]
    left = {0: seen(0, 8, "data", 50.0), 1: seen(1, 7, "optimiser", 60.0)}
    assert [one.beat.rank for one in behind(left)] == [1], "of an earlier step, whatever it is in"


def test_beats_of_another_start_are_not_looked_at_and_are_cleared(tmp_path: Path) -> None:
    before = Heartbeats(tmp_path, "before", 1, 2)
    before.beat(9)
    before.give_up("old")
    now = Heartbeats(tmp_path, "now", 0, 2)
    note("data")
    now.beat(3)
    assert list(now.read()) == [0] and not now.given_up
    now.clear_others()
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["rank_00000.json"]
    found = now.read()[0]
    assert (found.beat.step, found.beat.phase) == (3, "data")


def test_age_grows_until_the_number_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats, now = Heartbeats(tmp_path, "now", 0, 1), time.monotonic()
    beats.beat(1)
    for later, expected in ((0, 0.0), (5, 5.0), (9, 9.0)):
        monkeypatch.setattr(time, "monotonic", lambda later=later: now + later)
        assert beats.read()[0].age_s == pytest.approx(expected)
    beats.beat(1)
    assert beats.read()[0].age_s == 0


def test_only_the_first_verdict_counts(tmp_path: Path) -> None:
    first, second = (Heartbeats(tmp_path, "now", rank, 2) for rank in (0, 1))
    assert first.give_up("a") and not second.give_up("b")
    assert second.given_up


def test_only_a_process_that_waits_for_the_signal_gets_it(tmp_path: Path) -> None:
    hold = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
    sleep = "import time; print(1, flush=True); time.sleep(60)"
    for code, expected in ((hold + sleep, True), (sleep, False)):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert stacks.takes_signal(process.pid) is expected
            process.kill()
    assert not stacks.takes_signal(2**22 + 1)


def test_stacks_tell_what_was_going_on(tmp_path: Path) -> None:
    stacks.announce(tmp_path, 3)
    note("data")
    path = stacks.dump(12)
    assert path == tmp_path / "stacks" / "rank_00003_step_00000012.txt"
    text = path.read_text()
    assert f"step 12, host {os.uname().nodename}, pid {os.getpid()}: data for 0 s" in text
    assert "in test_stacks_tell_what_was_going_on" in text


#: A rank with a short-tempered watchdog, in trouble of one kind or another.
PROGRAM = """
import logging, os, shutil, sys, time
from pathlib import Path
import torch
from pretrain.recipe.schema import Watchdog as Options
from pretrain.runtime import terminal, watchdog
from pretrain.runtime.activity import note
from pretrain.runtime.process_group import Ranks

folder, trouble = Path(sys.argv[1]), sys.argv[2]
watchdog.SUSPENDED_S, terminal.SAY_S = 1.0, 0.5
logging.basicConfig(level=logging.INFO)
options = Options(beat_s=0.1, least_s=0.5, long_s=0.5, stop_after_s=0.7)
watch = watchdog.Watchdog(options, 300.0, folder, Ranks(0, 1, 0, torch.device("cpu")))
watch.begin(0)
for step in range(10):
    note("forward")
    time.sleep(0.02)
    watch.step_done(step + 1)
if trouble == "lost disk":
    while not (folder / "heartbeats").is_file():  # a beat in between makes the folder again
        shutil.rmtree(folder / "heartbeats", ignore_errors=True)
        try:
            (folder / "heartbeats").write_text("no folder any more")
        except OSError:
            pass
print("ready", flush=True)
if trouble == "console":
    logging.info("x" * 10_000_000)  # nobody reads: this thread stands here, with the handler's lock in its hand
elif trouble == "suspended":
    for _ in range(40):
        note("all-reduce")
        time.sleep(0.05)
        if (folder / "go on").exists():
            break
    watch.step_done(11)
    watch.close()
    sys.exit(0)
time.sleep(60)
"""


def start(tmp_path: Path, trouble: str) -> "subprocess.Popen[str]":
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), trouble],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )


@pytest.mark.parametrize("trouble", ["lost disk", "console", "nothing"])
def test_the_verdict_depends_on_no_file_and_no_console(tmp_path: Path, trouble: str) -> None:
    process = start(tmp_path, trouble)
    try:
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
    assert process.stderr is not None
    output = process.stderr.read()
    assert "hang: step 11 has not finished" in output or trouble == "console"
    assert ("could be written" in output) == (trouble == "lost disk")


def test_a_suspended_process_is_not_judged_by_its_sleep(tmp_path: Path) -> None:
    process = start(tmp_path, "suspended")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.6)  # another stall as long as it is allowed, so that the sleep counts if anybody counts it
    (tmp_path / "go on").touch()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stood still for" in errors
