"""Jobs of launch/slurm/pretrain.sbatch over two nodes of a real Slurm: each comes back and loses nothing.

`loses nothing`: the losses of all steps are, bit for bit, those of a run that nothing happened to.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import OVERRIDES

#: A job starts several times, and each start imports torch.
pytestmark = pytest.mark.timeout(1500)

#: Step at which a run is disturbed: checkpoints are 25 steps apart, so steps are lost where nothing is saved.
STEP = 35


def disturbed(site: Any, name: str, **environ: str) -> str:
    """Submit a run and wait until it is well under way; returns the job's number."""
    job: str = site.submit(name, **environ)
    site.wait_for_step(name, job, STEP)
    return job


def came_back(site: Any, name: str, job: str, undisturbed: list[float], restarts: int = 1) -> str:
    """Wait for the end and compare; returns what the job printed."""
    said: str = site.finish(name, job)
    assert site.cluster.job(job, "Restarts") == str(restarts), said
    assert site.toy.losses(name) == undisturbed
    assert "continuing from" in said
    return said


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_usr1_with_a_launcher_on_each_node(site: Any, undisturbed: list[float], launcher: str, tmp_path: Path) -> None:
    """In what stands for a container: a command before python that does something and then runs its arguments."""
    container = tmp_path / "container"
    container.write_text('#!/bin/sh\necho "$1" >>"$0.log"\nshift\nexec "$@"\n')
    container.chmod(0o755)
    job = disturbed(site, launcher, TUBELET_LAUNCHER=launcher, TUBELET_CONTAINER_RUN=f"{container} image")
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    said = came_back(site, launcher, job, undisturbed)
    assert f"{launcher}: 2 nodes with 1 ranks each" in said
    assert "asked to stop" in said and "stopped with a checkpoint: back to the queue" in said
    assert (tmp_path / "container.log").read_text() == "image\n" * 6  # a check and two launchers, twice


@pytest.mark.faults
def test_usr1_a_killed_rank_and_scontrol_requeue(site: Any, undisturbed: list[float]) -> None:
    """One srun task a rank, and one job to which all of it happens.

    What Slurm and job.sh do is in `make test` with stand-ins for ranks (test_job_control.py), what ranks do without
    Slurm (tests/engine/test_ranks.py, test_recovery.py).
    """
    job = disturbed(site, "three")
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    again(site, "three", job, restarts=1, step=65)
    site.cluster.running("n2", "launch/pretrain.py")[0].kill()
    again(site, "three", job, restarts=2, step=95)
    site.cluster.run("scontrol", "requeue", job)
    said = came_back(site, "three", job, undisturbed, restarts=3)
    assert "srun: 2 nodes with 1 ranks each" in said
    assert "stopped with a checkpoint: back to the queue" in said
    assert "failure 1 without going beyond" in said
    assert "ended without a word" not in said, "scontrol requeue leaves time for a save"


def again(site: Any, name: str, job: str, restarts: int, step: int) -> None:
    """Wait until a job has come back and done a further step."""

    def back() -> bool:
        site.cluster.start_now(job)
        return f"start {restarts}] srun" in site.said(name)

    site.cluster.wait("the job comes back", back)
    site.wait_for_step(name, job, step)


@pytest.mark.parametrize("override", ["batch.sampels=8", "batch.samples=4"])
def test_a_wrong_recipe_ends_the_job_for_good(site: Any, override: str) -> None:
    """Also one that is wrong for two ranks only: the check before them knows how many there will be."""
    job = site.submit(override, overrides=(override,))
    said = site.finish(override, job, expect="FAILED")
    assert override.partition("=")[0] in said and "does not go back to the queue" in said
    assert "ranks each" not in said, "no rank was started"
    assert (site.cluster.job(job, "ExitCode"), site.cluster.job(job, "Restarts")) == ("2:0", "0")


def test_what_srun_calls_2_is_no_wrong_usage(site: Any) -> None:
    job = site.submit("no wrapper", TUBELET_CONTAINER_RUN="/nowhere/apptainer exec", TUBELET_MAX_FAILURES="0")
    said = site.finish("no wrapper", job, expect="FAILED")
    assert "2 without a word of the program" in said and "failed with 1, for good" in said


@pytest.mark.faults
def test_a_crash_that_repeats_gives_up(site: Any) -> None:
    """Its data is not there: no start gets to a step, so the second failure is the last."""
    nowhere = f"data.sources.toy.shards={site.toy.folder / 'nowhere'}"
    job = site.submit("crashing", overrides=(nowhere,), TUBELET_MAX_FAILURES="1")
    said = site.finish("crashing", job, expect="FAILED")
    assert said.count("back to the queue") == 1 and "for good" in said
    assert site.cluster.job(job, "Restarts") == "1"


@pytest.mark.faults
def test_scancel_tells_that_the_run_has_saved(site: Any) -> None:
    job = site.submit("cancelled")
    site.wait_for_step("cancelled", job, 5)
    site.cluster.run("scancel", job)
    said = site.finish("cancelled", job, expect="CANCELLED")
    site.cluster.wait("it says so", lambda: "decides itself" in site.said("cancelled"))
    said = site.said("cancelled")
    assert "stopped with a checkpoint; Slurm ended this job" in said and "failed with" not in said


@pytest.mark.faults
def test_the_time_limit(site: Any) -> None:
    """A minute, the shortest that Slurm knows, and it signals up to a minute early: the run must outlast several."""
    overrides = (*OVERRIDES, "schedule.epochs=200")
    site.toy.train("long", *overrides, ranks=2)
    limits = ("--time=1", "--signal=B:USR1@20")
    job = site.submit("limited", *limits, overrides=overrides, TUBELET_STOP_LEAD_S="20")
    said = site.finish("limited", job)
    assert site.toy.losses("limited") == site.toy.losses("long")
    assert int(site.cluster.job(job, "Restarts")) >= 1
    assert "asked to stop" in said or "wall-clock limit" in said


@pytest.mark.faults
def test_a_node_that_dies(site: Any, undisturbed: list[float]) -> None:
    """SIGKILL to slurmd and all that runs there; Slurm notices it and requeues the job, which waits for the node."""
    job = disturbed(site, "dead node")
    site.cluster.kill_node("n2")
    site.cluster.wait("Slurm gives the node up", lambda: site.cluster.node_state("n2").startswith("DOWN"))
    site.cluster.start_node("n2")
    came_back(site, "dead node", job, undisturbed)
