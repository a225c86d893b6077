import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.runtime.stopping import SIGNALS, StopWatch


@pytest.fixture
def watches() -> Iterator[list[StopWatch]]:
    made: list[StopWatch] = []
    yield made
    for watch in reversed(made):
        watch.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_process_goes_on(tmp_path: Path, watches: list[StopWatch], number: int) -> None:
    signal.signal(number, signal.SIG_DFL)  # in the background of a shell Ctrl-C is ignored, and would stay so
    watches.append(StopWatch(tmp_path, first=False, time_limit_minutes=None, environ={}))
    assert not watches[0].asked()
    os.kill(os.getpid(), number)
    assert watches[0].asked()
    assert watches[0].reason == signal.Signals(number).name


def test_nohup_means_what_it_says(tmp_path: Path, watches: list[StopWatch]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watches.append(StopWatch(tmp_path, first=False, time_limit_minutes=None, environ={}))
        os.kill(os.getpid(), signal.SIGHUP)
        assert not watches[0].asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time; from pathlib import Path; from pretrain.runtime.stopping import StopWatch\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "watch = StopWatch(Path(sys.argv[1]), False, None, environ={})\n"
        "os.kill(os.getpid(), signal.SIGINT); print(watch.reason, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); print('still here'); time.sleep(9)"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "SIGINT\n")


def test_a_prolonged_job_is_noticed_before_it_is_stopped_for_its_end(tmp_path: Path, watches: list[StopWatch]) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(time.time() + 31)}
    watch = StopWatch(tmp_path, True, None, environ=environ)
    watches.append(watch)
    watch.saved_in(12)
    assert not watch.asked()
    (tmp_path / ".end_time").write_text(f"7.0 {time.time() + 600:.0f}\n")
    watch.saved_in(200)  # doubled, this is more than the first end leaves, and less than the second
    assert not watch.asked()
    watch.saved_in(400)
    assert watch.asked() and watch.reason == "wall-clock limit"


@pytest.mark.parametrize("left", ["8.1 9999999999\n", "7.0 9999999999\n", "7.1 1\n", "7.1 999", "7.1 soon\n", ""])
def test_what_another_job_left_prolongs_nothing(tmp_path: Path, watches: list[StopWatch], left: str) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "SLURM_JOB_END_TIME": str(time.time() + 10)}
    watches.append(StopWatch(tmp_path, True, None, environ=environ))
    (tmp_path / ".end_time").write_text(left)
    assert watches[0].asked()


def test_stop_file_is_seen_by_rank_0_only_and_consumed(tmp_path: Path, watches: list[StopWatch]) -> None:
    (tmp_path / "stop").touch()  # of the run before: must not stop this one
    first = StopWatch(tmp_path, first=True, time_limit_minutes=None, environ={})
    watches += [first, StopWatch(tmp_path, first=False, time_limit_minutes=None, environ={})]
    assert not first.asked()
    (tmp_path / "stop").touch()
    assert [watch.asked() for watch in watches] == [True, False]
    first.close()
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    ("limit", "ago_s", "save_s", "environ", "expected"),
    [
        (10, 0, 0, {}, False),
        (10, 571, 0, {}, True),
        (10, 500, 60, {}, True),
        (10, 470, 60, {}, False),
        (None, 0, 0, {"SLURM_JOB_END_TIME": "+20"}, True),
        (None, 0, 0, {"SLURM_JOB_END_TIME": "+200"}, False),
        (None, 0, 90, {"SLURM_JOB_END_TIME": "+170"}, True),
        (10, 0, 0, {"SLURM_JOB_END_TIME": "+20"}, False),
        (None, 1e9, 0, {}, False),
    ],
)
def test_wall_clock_limit_leaves_room_for_a_save(
    tmp_path: Path,
    watches: list[StopWatch],
    limit: float | None,
    ago_s: float,
    save_s: float,
    environ: dict[str, str],
    expected: bool,
) -> None:
    absolute = {key: str(time.time() + float(value)) for key, value in environ.items()}
    started = time.time() - ago_s
    watches.append(StopWatch(tmp_path, True, limit, started, environ=absolute or {"OTHER": ""}))
    watches[0].saved_in(save_s)
    assert watches[0].asked() is expected


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    StopWatch(tmp_path, first=True, time_limit_minutes=None, environ={}).close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_save_longer_than_half_the_job_scripts_lead_is_warned_of_now_and_at_the_next_start(
    tmp_path: Path, watches: list[StopWatch], caplog: pytest.LogCaptureFixture
) -> None:
    environ = {"TUBELET_STOP_LEAD_S": "100"}

    def start(first: bool = True) -> StopWatch:
        watches.append(StopWatch(tmp_path, first, time_limit_minutes=None, environ=environ))
        return watches[-1]

    watch = start()
    watch.saved_in(49)
    assert not caplog.records
    watch.saved_in(70)
    watch.saved_in(80)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a save takes 70 s" in caplog.text and "at least 170 s" in caplog.text
    caplog.clear()
    start(first=False)
    assert not caplog.records
    start()
    assert "a save takes 80 s" in caplog.text
    environ["TUBELET_STOP_LEAD_S"] = "300"
    caplog.clear()
    start()
    assert not caplog.records
