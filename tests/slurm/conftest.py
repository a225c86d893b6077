"""A Slurm cluster of two nodes on this machine, and runs submitted to it as a user does."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.slurm_cluster import SlurmCluster, missing_programs
from tests.toy_run import Toy

ROOT = Path(__file__).resolve().parents[2]

EPOCHS = 30
#: Of 5 steps an epoch, see tests/toy_run.py.
STEPS = 5 * EPOCHS
OVERRIDES = (f"schedule.epochs={EPOCHS}", "checkpoint.every_steps=25", "zero.stage=1")


@dataclasses.dataclass(frozen=True)
class Site:
    """The cluster and the toy recipe; two nodes with one rank each."""

    cluster: SlurmCluster
    toy: Toy

    def submit(self, name: str, *options: str, overrides: tuple[str, ...] = OVERRIDES, **environ: str) -> str:
        """sbatch launch/slurm/pretrain.sbatch into the run folder `name`; returns the job's number."""
        sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=20"]
        words = [*sizes, f"--output={self.log(name)}", *options, "launch/slurm/pretrain.sbatch"]
        words += ["--recipe", str(self.toy.recipe), self.toy.run_dir(name), *overrides]
        return self.cluster.run("sbatch", "--parsable", *words, environ=self.environment(**environ), cwd=ROOT)

    def environment(self, **more: str) -> dict[str, str]:
        """A user's environment on this cluster: its virtual environment first on PATH, no accelerator."""
        environ = self.cluster.environment(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **more)
        return environ | {"PATH": str(Path(sys.executable).parent) + os.pathsep + environ["PATH"]}

    def log(self, name: str) -> Path:
        """What a job prints, over all its starts."""
        return Path(self.toy.folder / f"{name}.out")

    def said(self, name: str) -> str:
        """Text of that file."""
        return self.log(name).read_text() if self.log(name).exists() else ""

    def wait_for_step(self, name: str, job: str, step: int) -> None:
        """Return when the run has done `step`; fails with the job's output when the job ends before."""

        def reached() -> bool:
            state = self.cluster.job(job, "JobState")
            assert state not in ("FAILED", "COMPLETED", "TIMEOUT", "CANCELLED"), f"{state}\n{self.said(name)}"
            return any(record["step"] >= step for record in self.toy.records(name))

        self.cluster.wait(f"step {step} of {name}", reached)

    def finish(self, name: str, job: str, expect: str = "COMPLETED") -> str:
        """Wait for the job's end over all requeues; returns what it printed."""
        state = self.cluster.finish(job, timeout_s=400)
        assert state == expect, f"{state}\n{self.said(name)}"
        return self.said(name)


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster(Path(folder)) as started:
        yield started


@pytest.fixture(scope="session")
def site(cluster: SlurmCluster, toy: Toy) -> Site:  # noqa: F811
    return Site(cluster, toy)


@pytest.fixture(scope="session")
def undisturbed(toy: Toy) -> list[float]:  # noqa: F811
    """Losses of two ranks that nothing happened to, started without Slurm."""
    toy.train("undisturbed by Slurm", *OVERRIDES, ranks=2)
    losses: list[float] = toy.losses("undisturbed by Slurm")
    assert len(losses) == STEPS
    return losses
