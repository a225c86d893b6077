"""Do the detectors learn what they are for? Drawn people over real video, trained and judged by the product's commands.

python bench/detection_learning.py alone|others|before [--backgrounds VIDEOS] [--work FOLDER]
    alone    EVAD finds persons and tells what each does, with and without dropping tokens
    others   whether another person does the same: the plain detector against CycleACR
    before   what somebody did 20 seconds ago: CycleACR with its memory and without
Films and shards are made once and kept in --work. Results go to bench/results/ with the machine and the date.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

#: What all runs have in common. Films are 128 x 96 at 8 frames a second; a clip is the second around its keyframe.
COMMON = """\
input: {frames: 8, stride: 1, short_side: 96, flip: 0.5, pad: 32, max_boxes: 8}
data:
  sources: {figures: {shards: SHARDS/train, val: SHARDS/val}}
  lanes: 4
  shuffle_window: 64
  workers: 1
batch: {samples: 16, micro: 16}
evaluate: {every_epochs: 5, micro: 16, workers: 0, test: last}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_epochs: 10, keep_last: 1}
log: {every_steps: 40, pictures_every_steps: 0, wandb: disabled}
"""
EVAD = """\
model: {name: evad, size: custom, patch_size: 16, dim: 96, depth: 4, heads: 4, mlp_ratio: 4, classes: 5, drop_path: 0,
        pretrain_side: 96, keep_rate: 0.7, prune_blocks: [1], queries: 8, rcnn_heads: 2, query_dim: 64, query_heads: 4,
        query_hidden: 128, dynamic_dim: 32, pool_size: 5, action_pool_size: 5, decoder_dim: 96, decoder_depth: 2,
        decoder_heads: 4, decoder_drop_path: 0, action_hidden: 128}
objective: {name: evad, head_lr_scale: 1, metric: slowfast}
optim: {base_lr: 1e-3, base_batch: 16, layer_decay: 1}
schedule: {epochs: 40, warmup_epochs: 2}
"""
BACKBONE = """\
model: {name: classifier, size: custom, patch_size: 16, dim: 96, depth: 2, heads: 4, mlp_ratio: 4, classes: 2,
        drop_path: 0, pooling: token0, head_init_scale: 1, pretrain_frames: 8, pretrain_height: 96,
        pretrain_width: 128}
optim: {base_lr: 1e-3, base_batch: 16, layer_decay: 1}
schedule: {epochs: 30, warmup_epochs: 2}
"""
PLAIN = "objective: {name: detection, pixels: imagenet, test_boxes: truth, metric: slowfast}\n"
CYCLE = """\
objective: {name: cycleacr, pixels: imagenet, test_boxes: truth, metric: slowfast, dim: 64, hidden: 128, dropout: 0,
            extension: [0, 0], max_persons: 4, memory: MEMORY}
"""
NO_MEMORY = "{past: 0, future: 0, max_per_second: 2}"
MEMORY = "{past: 24, future: 0, max_per_second: 1}"


@dataclass(frozen=True)
class Run:
    """A recipe, and what is changed in it."""

    name: str
    recipe: str
    words: tuple[str, ...] = ()


RUNS: dict[str, list[Run]] = {
    "alone": [Run("evad_0.7", EVAD), Run("evad_unpruned", EVAD, ("model.keep_rate=1",))],
    "others": [
        Run("plain", BACKBONE + PLAIN),
        Run("cycleacr", BACKBONE + CYCLE.replace("MEMORY", NO_MEMORY)),
    ],
    "before": [
        Run("cycleacr_now", BACKBONE + CYCLE.replace("MEMORY", NO_MEMORY)),
        Run("cycleacr_memory", BACKBONE + CYCLE.replace("MEMORY", MEMORY)),
    ],
}


def command(*words: str) -> None:
    """Run one of the product's commands.

    Raises:
        SystemExit: it failed.
    """
    print("$", *words, flush=True)
    environ = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | os.environ
    if subprocess.run([sys.executable, *words], cwd=ROOT, env=environ).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")


def make_shards(kind: str, options: argparse.Namespace) -> Path:
    """Draw and pack the films of a set, unless they are there."""
    folder: Path = options.work / kind
    shards = folder / "shards"
    if not (shards / "val" / "index.json").is_file():
        counts = ("--train", str(options.train), "--val", str(options.val))
        command("bench/figures.py", kind, str(folder), "--backgrounds", str(options.backgrounds), *counts)
        for part in ("train", "val"):
            names = () if part == "train" else ("--labels", str(shards / "train" / "classes.json"))
            given = ("--annotations", str(folder / f"{part}.csv"), "--data-root", str(folder / part))
            pack = ("launch/pack.py", "--task", "detection", *given, str(shards / part), "--span", "1", "--copy")
            command(*pack, *names)
    return shards


def train(run: Run, shards: Path, folder: Path) -> dict[str, Any]:
    """Train and test; seconds and scores."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "own.yaml"
    recipe.write_text(COMMON.replace("SHARDS", str(shards)) + run.recipe, encoding="utf-8")
    began = time.monotonic()
    command("launch/finetune.py", "--recipe", str(recipe), *run.words, f"run.dir={folder / 'run'}")
    (scores,) = (folder / "run" / "predictions").glob("*/scores.json")
    return {"run": run.name, "seconds": round(time.monotonic() - began), **json.loads(scores.read_text())}


def main() -> None:
    """Run the command line."""
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(RUNS))
    parser.add_argument("--backgrounds", type=Path, default=Path(".cache/demo/camera"), help="folder of videos")
    parser.add_argument("--work", type=Path, default=Path("runs/detection_learning"), help="folder of films and runs")
    parser.add_argument("--train", type=int, default=160, help="films to train on (default 160)")
    parser.add_argument("--val", type=int, default=40, help="films to judge by (default 40)")
    parser.add_argument("--only", help="name of a single run")
    options = parser.parse_args()
    options.work, options.backgrounds = options.work.absolute(), options.backgrounds.absolute()
    shards = make_shards(options.set, options)
    chosen = [run for run in RUNS[options.set] if options.only in (None, run.name)]
    found = [train(run, shards, options.work / options.set / run.name) for run in chosen]
    print(json.dumps(found, indent=1))
    facts = {"set": options.set, "date": today, "machine": platform.processor() or platform.machine(), "runs": found}
    out = ROOT / "bench" / "results" / f"detection_learning_{options.set}_{today}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
