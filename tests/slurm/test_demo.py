"""The demo recipe over two nodes of a real Slurm, preempted in every way that one job can be."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Site
from tests.slurm.test_preemption import again

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

#: 240 steps; two checkpoints lie between any two of the accidents.
SHORTER = ("schedule.epochs=4", "schedule.warmup_epochs=1", "checkpoint.every_steps=20", "log.pictures_every_steps=0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` packs; held-out performers stand for the camera videos, which are not in the repository."""
    root = tmp_path_factory.mktemp("demo shards")
    for name, split in (("actions", "train"), ("camera", "test")):
        words = ["launch/pack.py", "tests/assets/actions/manifest.csv", str(root / name), "--where", f"split={split}"]
        subprocess.run([sys.executable, *words, "--copy"], cwd=ROOT, check=True, capture_output=True)
    return root


def test_the_demo_on_two_nodes_loses_nothing(site: Site, shards: Path) -> None:
    overrides = (*SHORTER, f"data.root={shards}")
    demo = dataclasses.replace(site, toy=dataclasses.replace(site.toy, recipe=Path("demo")))
    demo.toy.train("whole demo", *overrides, ranks=2)
    job = demo.submit("demo", overrides=overrides)
    demo.wait_for_step("demo", job, 30)
    demo.cluster.run("scancel", "--batch", "--signal=USR1", job)
    again(demo, "demo", job, restarts=1, step=70)
    demo.cluster.running("n2", "launch/pretrain.py")[0].kill()
    again(demo, "demo", job, restarts=2, step=110)
    demo.cluster.run("scontrol", "requeue", job)
    again(demo, "demo", job, restarts=3, step=150)
    demo.cluster.kill_node("n2")
    demo.cluster.wait("Slurm gives the node up", lambda: demo.cluster.node_state("n2").startswith("DOWN"))
    demo.cluster.start_node("n2")
    losses = demo.toy.losses("whole demo")
    assert len(losses) == 240
    demo.finish("demo", job)
    # More, where a node that came back gets a SIGTERM from its slurmd some time later, as was seen: the run saves then.
    assert int(demo.cluster.job(job, "Restarts")) >= 4
    assert demo.toy.losses("demo") == losses
