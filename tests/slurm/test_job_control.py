"""launch/slurm/job.sh on a real Slurm, with a few lines of shell for the ranks: it knows only what they say, and when.

The same with real ranks takes minutes: test_preemption.py, of which most is for `make faults`.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.timeout(600)

#: Holds the folder as a run does, saves for two seconds when it is asked to stop or ended, and is done in start LAST.
RANKS = """\
#!/bin/bash
case "$*" in *--check*) exit 0 ;; esac
start=${SLURM_RESTART_COUNT:-0}
if [ "$SLURM_PROCID" != 0 ]; then trap "sleep 2; exit 75" TERM; while [ ! -e RUN/left.$start ]; do sleep 0.1; done; fi
if [ "$SLURM_PROCID" != 0 ]; then exit 75; fi
exec 9>RUN/.lock
flock 9 || exit 1
echo "$SLURM_JOB_ID" >RUN/.holder
if [ "$start" = LAST ]; then echo '"exit_code": 0' >RUN/summary.json; touch RUN/left.$start; exit 0; fi
ended=0
trap 'ended=1; trap "" TERM' TERM
echo trains in start $start
while [ "$ended" = 0 ] && [ ! -e RUN/stop ]; do sleep 0.1; done
sleep 2
echo '"exit_code": 75' >RUN/summary.json
touch RUN/left.$start
exit 75
"""

#: By which launch/slurm/job.sh finds out what a run has said.
PROGRAMS = ("flock", "stat", "sed", "sleep", "date", "rm")


def submit(site: Any, name: str, folder: Path, last: int = 1) -> tuple[str, Path]:
    """Submit stand-ins for ranks into the run folder `name`; returns the job's number and its output."""
    program, log = folder / "ranks", folder / "output"
    folder.mkdir()
    program.write_text(RANKS.replace("RUN", site.toy.run_dir(name).partition("=")[2]).replace("LAST", str(last)))
    program.chmod(0o755)
    environ = {"TUBELET_CONTAINER_RUN": str(program), "TUBELET_LOOK_S": "1", "TUBELET_AGAIN_S": "1"}
    return site.submit(name, f"--output={log}", **environ), log


def wait_for_words(site: Any, log: Path, words: str) -> None:
    """Return when the job has said that."""
    site.cluster.wait(words, lambda: log.exists() and words in log.read_text(), timeout_s=60)


def end_programs_until(condition: Callable[[], bool], site: Any, job: str) -> None:
    """SIGTERM to all that the job's shell starts from now on: Slurm signals whole groups, and more than once."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        for process in site.cluster.processes("n1"):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_JOB_ID") == job and process.name() in PROGRAMS:
                    process.terminate()


def test_one_job_that_is_prolonged_met_by_another_and_cancelled(site: Any, tmp_path: Path) -> None:
    run = Path(site.toy.run_dir("words").partition("=")[2])
    first, log = submit(site, "words", tmp_path / "first")
    wait_for_words(site, log, "trains")

    site.cluster.run("scontrol", "update", f"JobId={first}", "TimeLimit=30")
    site.cluster.wait("the new end is known", (run / ".end_time").exists, timeout_s=60)
    job, end = (run / ".end_time").read_text().split()
    assert job == f"{first}.0" and 25 * 60 < float(end) - time.time() < 30 * 60

    second, other_log = submit(site, "words", tmp_path / "second")
    wait_for_words(site, other_log, "meet at")
    site.cluster.run("scancel", "--batch", "--signal=USR1", second)
    wait_for_words(site, other_log, "asked to stop")
    time.sleep(0.5)
    assert not (run / "stop").exists(), "which belongs to the first job"
    site.cluster.run("scancel", second)
    site.cluster.finish(second)
    assert "ended without a word of the run" in other_log.read_text()

    site.cluster.run("scancel", first)
    wait_for_words(site, log, "asked to stop")
    end_programs_until(lambda: "Slurm ended this job" in log.read_text(), site, first)
    assert "stopped with a checkpoint; Slurm ended this job" in log.read_text()
    assert "failed with" not in log.read_text() + other_log.read_text()


def test_a_job_comes_back_after_a_stop_and_after_a_killed_rank(site: Any, tmp_path: Path) -> None:
    job, log = submit(site, "back", tmp_path / "first", last=2)
    wait_for_words(site, log, "trains in start 0")
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    come_back(site, job, log, "trains in start 1")
    found = site.cluster.running("n1", str(tmp_path / "first" / "ranks"))
    next(process for process in found if process.name() == "ranks").kill()
    assert site.cluster.finish(job) == "COMPLETED", log.read_text()
    said = log.read_text()
    assert site.cluster.job(job, "Restarts") == "2", said
    assert "stopped with a checkpoint: back to the queue" in said
    assert "failure 1 without going beyond" in said and "failed with 137: back to the queue" in said


def come_back(site: Any, job: str, log: Path, words: str) -> None:
    """Return when the job is back and has said that."""

    def back() -> bool:
        site.cluster.start_now(job)
        return words in log.read_text()

    site.cluster.wait(words, back, timeout_s=60)


@pytest.mark.faults
def test_a_controller_that_is_away_strands_nobody(site: Any, tmp_path: Path) -> None:
    job, log = submit(site, "controller", tmp_path / "first")
    wait_for_words(site, log, "trains")
    began, state = time.time(), site.cluster.folder / "state" / "job_state"
    # A controller that comes back without knowing that the job has started ends it as a stranger.
    site.cluster.wait("it has saved that the job runs", lambda: state.exists() and state.stat().st_mtime > began + 1)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_words(site, log, "asked to stop")
    site.cluster.kill_controller()
    wait_for_words(site, log, "the controller does not answer")
    site.cluster.start_controller()
    assert site.cluster.finish(job) == "COMPLETED", log.read_text()
    assert site.cluster.job(job, "Restarts") == "1"
    said = log.read_text()
    time.sleep(3)
    assert log.read_text() == said, "nothing of the first start goes on"
