"""Shards of tiny real videos, a tiny recipe over them, and starting training as a user does."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests import forge
from tests.ranks import environment, free_port, kill_session, outputs_of, start_ranks
from tests.toy_shards import ROOT, encoded, index, write_shard

#: Trains run after run in one set of processes.
DRIVER = Path(__file__).with_name("toy_driver.py")
SAMPLES = 40
#: Optimiser steps of an epoch: 40 videos in 4 lanes, 8 videos a step.
STEPS_PER_EPOCH = 5

RECIPE = """\
model: {name: videomae, size: custom, patch_size: 16, dim: 32, depth: 2, heads: 2, mlp_ratio: 2,
        decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}
objective: {name: videomae, mask_ratio: 0.75}
input:
  frames: 8
  stride: 1
  height: 32
  width: 32
  decoder: pyav
data:
  sources: {toy: {shards: SHARDS}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {base_lr: 0.1, base_min_lr: 0.001, clip_grad: 1.0}
schedule: {epochs: 2, warmup_epochs: 0.4}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 4, keep_last: 2}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""


@dataclasses.dataclass(frozen=True)
class Toy:
    """A recipe file over toy shards, and a folder for runs."""

    recipe: Path
    folder: Path
    owners: dict[str, str] = dataclasses.field(default_factory=dict)
    """the test module of each run: a name that two of them use would let one continue the other's run"""

    def start(self, name: str, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
        """Start training into the run folder `name`, as a user does."""
        script = str(ROOT / "launch" / "pretrain.py")
        return launch([script, "--recipe", str(self.recipe), self.run_dir(name), *overrides], ranks, self.folder)

    def train(self, name: str, *overrides: str, expect: int = 0, ranks: int = 1) -> str:
        """Train to the end, on ranks as srun starts them; returns what was printed."""
        script = ROOT / "launch" / "pretrain.py"
        return train([script, "--recipe", self.recipe, self.run_dir(name), *overrides], ranks, self.folder, expect)

    def run_dir(self, name: str) -> str:
        """The override that names the run folder."""
        module = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        assert self.owners.setdefault(name, module) == module, f"{self.owners[name]} has a run {name!r} already"
        return f"run.dir={self.folder / name}"

    def drive(self, runs: dict[str, dict[str, Any]], ranks: int, expect: int = 0) -> dict[str, int | str]:
        """Train run after run in one set of processes; exit code or error of each by name (see toy_driver.py)."""
        plan = [entry | {"overrides": [self.run_dir(name), *entry["overrides"]]} for name, entry in runs.items()]
        path = self.folder / "plan.json"
        path.write_text(json.dumps(plan))
        # A run takes 2 s, and 20 s on a machine that does a dozen other things.
        output = train([DRIVER, self.recipe, path], ranks, self.folder, expect, timeout_s=240 + 40 * len(runs))
        lines = [line for line in output.splitlines() if line.startswith("RESULTS ")]
        return dict(zip(runs, json.loads(lines[0].removeprefix("RESULTS ")), strict=True)) if lines else {}

    def records(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self, name: str) -> list[float]:
        """Loss of each step of a run."""
        return [float(record["train/loss"]) for record in self.records(name)]

    def checkpoints(self, name: str) -> list[str]:
        """Names in a run's folder of checkpoints."""
        return sorted(path.name for path in (self.folder / name / "checkpoints").iterdir())

    def kill(self, process: subprocess.Popen[str]) -> None:
        """kill -9 of a launcher with all its ranks and workers."""
        kill_session(process)

    def wait_for(self, name: str, step: int, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
        """Return when the run has written the record of `step`."""
        deadline = time.monotonic() + timeout_s
        while not any(record["step"] >= step for record in self.records(name)):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"step {step} not reached"
            time.sleep(0.02)


def launch(words: list[str], ranks: int, folder: Path) -> subprocess.Popen[str]:
    """Start a script on some ranks, with the deepspeed launcher where there are several."""
    if ranks == 1:
        return forge.start(words, environment(), cwd=folder)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks)]
    launcher += ["--master_port", str(free_port())]
    # Ranks look at the command line of their launcher.
    return forge.start([*launcher, *words], environment(), fork=False, cwd=folder)


def train(
    words: Sequence[object], ranks: int, folder: Path, expect: int = 0, timeout_s: float = 240, **environ: str
) -> str:
    """Run a script to the end on some ranks, without a launcher, of which one needs none; returns what was printed."""
    if ranks == 1:
        processes = [forge.start(words, environment() | environ, cwd=folder)]
    else:
        processes = start_ranks(words, ranks, environ=environ, cwd=folder)
    output = "\n".join(outputs_of(processes, timeout_s))
    codes = [process.returncode for process in processes]
    assert codes == [expect] * ranks, f"exit codes {codes} instead of {expect}\n{output}"
    return output


def finish(process: subprocess.Popen[str], expect: int = 0, timeout_s: float = 240) -> str:
    """Wait for the end and the expected exit code; returns what was printed."""
    (output,) = outputs_of([process], timeout_s)
    assert process.returncode == expect, f"exit code {process.returncode} instead of {expect}\n{output}"
    return output


def _sample(number: int) -> tuple[str, dict[str, Any], bytes]:
    """A square that moves over a textured ground: 12 frames of 48 x 48.

    Never flat: the normalised pixels of a cube of one colour are rounding errors, and no two runs would agree on them.
    """
    rng = np.random.default_rng(number)
    ground = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)
    colour = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
    (x, y), (dx, dy) = rng.integers(0, 15, 2), rng.integers(0, 3, 2)
    frames = [ground.copy() for _ in range(12)]
    for t, frame in enumerate(frames):
        frame[y + t * dy : y + t * dy + 12, x + t * dx : x + t * dx + 12] = colour
    facts = {"label": number % 2, "source": f"toy/{number}", "fps": 12, "frames": 12, "width": 48, "height": 48}
    return f"{number:04d}", facts, encoded(frames)


def make_toy(folder: Path) -> Toy:
    """Shards, index and recipe in a folder."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    for shard in range(2):
        numbers = range(shard * SAMPLES // 2, (shard + 1) * SAMPLES // 2)
        write_shard(shards / f"toy-{shard:06d}.tar", map(_sample, numbers))
    recipe = folder / "toy.yaml"
    recipe.write_text(RECIPE.replace("SHARDS", str(shards)))
    index(shards)
    return Toy(recipe, folder)
