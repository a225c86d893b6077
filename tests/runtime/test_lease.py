"""The lock of a folder without flock: kept while its holder lives, taken over by one when it is gone.

flock is made to fail in the process, since the disks of a test machine all have it, and a name of its own stands for
the kernel of another machine. Files, processes and kills are real.
"""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from filelock import Timeout

from pretrain.errors import TrainingError
from pretrain.runtime import lease, run_folder, signs_of_life
from pretrain.runtime.lease import NO_FLOCK, PREFIX, Lease
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.run_folder import open_folder
from tests.toy_shards import ROOT

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
BEAT_S = 0.2

#: What a process on a machine of that name does with the folder, after the words FOLDER, MACHINE and what.
PROCESS = f"""
import os, signal, sys, time
from pathlib import Path
from pretrain.runtime import lease, signs_of_life
from pretrain.runtime.heartbeats import Heartbeats
root, machine, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if machine != "this":
    lease.kernel = signs_of_life.kernel = lambda: machine
mine = lease.Lease(root, {BEAT_S})
if what == "heartbeat":
    beats = Heartbeats(root, "start", 0, 1)
    while True:
        beats.beat(1)
        print("has it", flush=True)
        time.sleep({BEAT_S})
if what == "checks":
    lease.Lease._beat = lambda *_: None
try:
    mine.acquire(timeout=0 if what != "contends" else 1)
except lease.Timeout:
    sys.exit(3)
print("has it", flush=True)
if what == "contends":
    time.sleep(3)
    os._exit(0)
if what == "checks":
    os.kill(os.getpid(), signal.SIGSTOP)
    mine.check()
else:
    time.sleep(600)
(root / "written").touch()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts such a process; returns when it has the folder."""
    started = []

    def launch(machine: str, what: str = "holds", wait: bool = True) -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", PROCESS, str(tmp_path), machine, what]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        if wait:
            assert process.stdout and process.stdout.readline() == "has it\n"
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("code", NO_FLOCK)
def test_a_folder_without_flock_is_kept_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0)
    _, hold = open_folder(str(tmp_path), ALONE, BEAT_S)
    assert "has no flock" in caplog.text
    with pytest.raises(TrainingError, match=rf"in use by host .*, pid {os.getpid()}"):
        open_folder(str(tmp_path), ALONE, BEAT_S)
    hold.release()
    with lease.held(tmp_path), pytest.raises(Timeout):
        Lease(tmp_path, BEAT_S).acquire(timeout=0)
    open_folder(str(tmp_path), ALONE, BEAT_S)[1].release()
    assert "taken over" not in caplog.text
    code = errno.EIO
    with pytest.raises(TrainingError, match="can't be written"):
        open_folder(str(tmp_path), ALONE, BEAT_S)


def test_a_killed_holder_of_this_machine_is_known_at_once(start: Start, tmp_path: Path) -> None:
    holder = start("this")
    with pytest.raises(Timeout):
        Lease(tmp_path, BEAT_S).acquire(timeout=0)
    holder.kill()  # it stays a zombie until it is waited for
    time.sleep(0.1)
    Lease(tmp_path, BEAT_S).acquire(timeout=0)


def test_a_suspended_holder_of_this_machine_keeps_it(start: Start, tmp_path: Path) -> None:
    holder = start("this")
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(Timeout):
        Lease(tmp_path, BEAT_S).acquire(timeout=2 * lease.GONE_BEATS * BEAT_S)


@pytest.mark.parametrize("what", ["holds", "heartbeat"])
def test_a_holder_of_another_machine_has_it_while_it_gives_signs_of_life(
    start: Start, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one whose mount has flock, which only its heartbeat shows."""
    holder = start("another", what)
    with pytest.raises(Timeout, match=str(holder.pid)):
        Lease(tmp_path, BEAT_S).acquire(timeout=2 * lease.GONE_BEATS * BEAT_S)
    holder.kill()
    time.sleep(BEAT_S)
    killed = time.monotonic()
    mine = Lease(tmp_path, BEAT_S)
    mine.acquire(timeout=0.1)
    assert time.monotonic() - killed > (lease.GONE_BEATS - 3) * BEAT_S
    assert ("taken over" in caplog.text) == (what == "holds")
    mine.release()


def test_the_clocks_of_hosts_may_differ(start: Start, tmp_path: Path) -> None:
    """Times of a living holder lie an hour back, as where they are its host's."""
    start("another").send_signal(signal.SIGSTOP)
    end = threading.Event()

    def beat() -> None:
        while True:
            then = time.time() - 3600
            os.utime(tmp_path / f"{PREFIX}000001", (then, then))
            if end.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(BEAT_S / 2)
    with pytest.raises(Timeout):
        Lease(tmp_path, BEAT_S).acquire(timeout=2 * lease.GONE_BEATS * BEAT_S)
    end.set()
    thread.join()


def test_of_many_that_take_over_exactly_one_wins(start: Start, tmp_path: Path) -> None:
    start("dead").kill()
    many = [start(f"machine {number}", "contends", wait=False) for number in range(4)]
    assert sorted(process.wait() for process in many) == [0, 3, 3, 3]


def test_a_number_that_was_used_and_cleared_away_wins_nothing(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}000007").touch()
    slow = Lease(tmp_path, BEAT_S)
    assert not slow._take(4) and not slow._take(7) and os.listdir(tmp_path) == [f"{PREFIX}000007"]
    assert slow._take(8) and os.listdir(tmp_path) == [f"{PREFIX}000008"]
    slow.release()


def test_the_file_of_a_replaced_folder_is_another_holders(tmp_path: Path) -> None:
    mine, other = Lease(tmp_path / "run", 60), Lease(tmp_path / "run", 60)
    (tmp_path / "run").mkdir()
    mine.acquire(timeout=0)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    other.acquire(timeout=0)
    assert mine.path == other.path and mine._lost() and not other._lost()
    mine.release()
    holder = signs_of_life.read_holder(other.path)
    assert holder is not None and not holder.released
    other.release()


@pytest.mark.parametrize("what", ["holds", "checks"])
def test_who_was_taken_over_while_it_stood_still_ends_without_writing(start: Start, tmp_path: Path, what: str) -> None:
    """By the thread that gives its signs of life, and by the check before each step's records."""
    sleeper = start("another", what)
    # The one that checks stops itself: stopped from here as well, it would stand still again behind SIGCONT.
    if what == "holds":
        sleeper.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 20
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < until
        time.sleep(0.01)
    mine = Lease(tmp_path, BEAT_S)
    mine.acquire(timeout=0.1)
    before = sorted(os.listdir(tmp_path))
    sleeper.send_signal(signal.SIGCONT)
    _, said = sleeper.communicate(timeout=20)
    assert sleeper.returncode == 1 and f"pid {os.getpid()} has taken the folder over" in said
    assert sorted(os.listdir(tmp_path)) == before
    mine.check()
    mine.release()
