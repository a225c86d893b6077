"""docs/clusters.md, command by command, on a real Slurm with two nodes and a real S3 server."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.toy_run import RECIPE
from tests.toy_shards import ROOT

TEXT = (ROOT / "docs" / "clusters.md").read_text()

FINETUNE = """\
model: {name: classifier, size: custom, patch_size: 16, dim: 32, depth: 2, heads: 2, mlp_ratio: 2, classes: 4,
        drop_path: 0, positions: rebuild}
objective: {name: classification}
input:
  frames: 8
  stride: 1
  height: 32
  width: 32
  decoder: pyav
data:
  sources: {k400: {shards: "${data.root}/k400", val: "${data.root}/k400_val"}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
schedule: {epochs: 2, warmup_epochs: 0.5}
evaluate: {every_epochs: 1, clips: 1, crops: 1, micro: 4, workers: 0}
compute: {dtype: fp32}
log: {every_steps: 1, wandb: disabled, peak_tflops: 0.1}
"""

#: What a reader of section 2 puts in, in this test.
PLACES = {"NODES": "2", "GPUS": "1", "CPUS": "1", "BUCKET": "s3://bucket"}


def sections() -> dict[str, list[str]]:
    """Shell blocks of each numbered section."""
    parts = re.split(r"^## \d+\. (.*)$", TEXT.partition("\n# Settings")[0], flags=re.MULTILINE)
    return {
        title: re.findall(r"```bash\n(.*?)```", body, re.DOTALL)
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


class Reader:
    """Types the blocks into one shell after another, with the variables that the last one left."""

    def __init__(self, site: Any, environ: dict[str, str], places: dict[str, str]) -> None:
        self.site, self.environ, self.places = site, environ, places

    def type(self, block: str) -> str:
        """Run a block; returns what it printed."""
        state = self.site.cluster.folder / "reader.env"
        script = f"set -euo pipefail\n{block}\nenv --null >{state}\n"
        done = subprocess.run(["bash", "-c", script], env=self.environ, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        self.environ = dict(entry.split("=", 1) for entry in state.read_text().split("\0") if entry)
        return done.stdout

    def fill_in(self, block: str) -> str:
        """Section 2 with this machine's places."""
        for name, value in self.places.items():
            block, count = re.subn(rf"\b{name}=\S+", lambda found, n=name, v=value: f"{n}={v}", block)
            assert count == 1, name
        return block

    def queue_is_empty(self) -> bool:
        """Whether all jobs have ended; those that wait after a requeue are hurried."""
        jobs = self.site.cluster.run("squeue", "--noheader", "--format=%A").split()
        for job in jobs:
            self.site.cluster.start_now(job)
        return not jobs

    def wait(self) -> None:
        """Return when the queue is empty."""
        self.site.cluster.wait("the queue is empty", self.queue_is_empty, timeout_s=400)


def write_lists(folder: Path) -> dict[str, str]:
    """Lists of a few labelled clips of this repository, and the tiny recipes over them."""
    rows = list(csv.DictReader((ROOT / "tests/assets/actions/manifest.csv").open()))
    labels = sorted({row["label"] for row in rows})[:4]
    lists = {}
    for name, split, count in (("TRAIN", "train", 6), ("VALIDATION", "test", 2)):
        lines = ["path,label"]
        for label in labels:
            clips = [row for row in rows if (row["label"], row["split"]) == (label, split)][:count]
            lines += [f"{ROOT}/tests/assets/actions/{row['path']},{label}" for row in clips]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
        lists[name] = str(folder / f"{name}.csv")
    recipe = RECIPE.replace("{toy: {shards: SHARDS}}", '{k400: {shards: "${data.root}/k400"}}').replace(
        "{epochs: 2, warmup_epochs: 0.4}", "{epochs: 60, warmup_epochs: 2}"
    )
    recipe = recipe.replace("every_steps: 4", "every_steps: 20")
    (folder / "pretrain.yaml").write_text(recipe)
    (folder / "finetune.yaml").write_text(FINETUNE)
    return lists | {"RECIPE": str(folder / "pretrain.yaml"), "FINETUNE": str(folder / "finetune.yaml")}


def test_the_sections_are_those_that_are_typed() -> None:
    assert [title.split(",")[0] for title in sections()][:3] == ["Install", "Say what is where", "Pack"]
    assert len(sections()) == 10
    assert "make install" in sections()["Install"][0]  # what `make test` does before it comes here


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_every_command(site: Any, s3_server: Any, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    places = PLACES | write_lists(tmp_path) | {"SHARED": str(shared)}
    places["AWS_ENDPOINT_URL"] = s3_server.options()["endpoint_url"]
    checks = {
        f"AWS_{name}": "when_required" for name in ("REQUEST_CHECKSUM_CALCULATION", "RESPONSE_CHECKSUM_VALIDATION")
    }
    environ = site.environment(**checks)
    environ.pop("FSSPEC_S3")
    logs_go_elsewhere = {"SBATCH_OUTPUT": str(tmp_path / "%x-%A.out")}
    reader = Reader(site, environ | logs_go_elsewhere, places)
    blocks = sections()
    reader.type(reader.fill_in(blocks["Say what is where"][0]))
    packing, checking = blocks["Pack, with a job array"]
    reader.type(packing)
    reader.wait()
    reader.type(checking)
    plan, doctor = blocks["Plan"]
    assert "parameters" in reader.type(plan)
    reader.type("export MASTER_ADDR=127.0.0.1")  # n1 and n2 are no names that a resolver knows
    reader.type(doctor)
    reader.type(blocks["Submit"][0])
    records = shared / "first" / "metrics.jsonl"
    site.cluster.wait("ten steps", lambda: records.exists() and len(records.read_text().splitlines()) > 10)
    assert '"step"' in reader.type(blocks["Watch"][0].replace('"pretrain-', f'"{tmp_path}/pretrain-'))
    interrupt, hurry = blocks["Interrupt it"]
    reader.type(interrupt)
    job = reader.environ["JOB"]
    site.cluster.wait("it comes back", lambda: site.cluster.job(job, "Restarts") == "1")
    site.cluster.wait("it waits", lambda: site.cluster.job(job, "JobState") == "PENDING")
    reader.type(hurry)
    done = len(records.read_text().splitlines())
    # A start removes the stop file of the one before, so only a run that makes steps can be stopped.
    site.cluster.wait("it goes on", lambda: len(records.read_text().splitlines()) > done + 2)
    stop, smaller = blocks["Go on with another number of GPUs"]
    reader.type(stop)
    site.cluster.wait("it stops", lambda: site.cluster.job(job, "Restarts") == "2")
    reader.type(smaller)
    reader.wait()
    assert json.loads((shared / "first" / "summary.json").read_text())["reason"] == "done"
    assert list((s3_server.bucket / "runs" / "first").rglob("manifest.json"))
    reader.type(blocks["Fine-tune"][0])
    reader.wait()
    assert json.loads((shared / "tuned" / "summary.json").read_text())["reason"] == "done"
    reader.type(blocks["Take the weights home"][0])
    assert os.listdir(shared / "weights")
