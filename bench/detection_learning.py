"""Do the detectors learn what they are for? Drawn people over real video, trained and judged by the product's commands.

python bench/detection_learning.py [alone] [others] [before] [--backgrounds VIDEOS] [--work FOLDER]
    alone    EVAD finds persons and tells what each does, with and without dropping tokens
    others   whether another person does the same, beside what each does: the plain detector against CycleACR
    before   what somebody did 20 seconds ago, beside what it does: CycleACR with its memory and without
Backgrounds are the camera clips of the demo: python -m pretrain.commands.camera_clips. Films, shards and results stay
in --work: what is done there is not done again.
"""

import argparse
import csv
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

#: What all runs have in common. Films are 128 x 96 at 8 frames a second; a clip is the second around its keyframe. Half
#: their size is enough: a patch of 8 holds a limb's movement, and tokens are as few as with patches of 16 of all of it.
COMMON = """\
input: {frames: 8, stride: 1, short_side: 48, flip: 0.5, pad: 16, max_boxes: 4}
data:
  sources: {figures: {shards: SHARDS/train, val: SHARDS/val}}
  lanes: 4
  shuffle_window: 64
  workers: 1
batch: {samples: 16, micro: 16}
optim: {base_lr: 1e-3, base_batch: 16, betas: [0.9, 0.999], weight_decay: 0.01, layer_decay: 1}
evaluate: {every_epochs: 5, micro: 16, workers: 0, test: last}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_epochs: 10, keep_last: 1}
log: {every_steps: 50, pictures_every_steps: 0, wandb: disabled}
"""
EVAD = """\
model: {name: evad, size: custom, patch_size: 8, dim: 64, depth: 4, heads: 4, mlp_ratio: 4, classes: 4, drop_path: 0,
        pretrain_side: 48, keep_rate: 0.7, prune_blocks: [1], queries: 6, rcnn_heads: 2, query_dim: 48, query_heads: 4,
        query_hidden: 96, dynamic_dim: 16, pool_size: 5, action_pool_size: 5, decoder_dim: 64, decoder_depth: 2,
        decoder_heads: 4, decoder_drop_path: 0, action_hidden: 128}
objective: {name: evad, head_lr_scale: 1, metric: slowfast}
schedule: {epochs: 10, warmup_epochs: 1}
"""
BACKBONE = """\
model: {name: classifier, size: custom, patch_size: 8, dim: 64, depth: 2, heads: 4, mlp_ratio: 4, classes: 4,
        drop_path: 0, pooling: token0, head_init_scale: 1, pretrain_frames: 8, pretrain_height: 48, pretrain_width: 64}
schedule: {epochs: 10, warmup_epochs: 1}
"""
PLAIN = "objective: {name: detection, pixels: imagenet, test_boxes: truth, metric: slowfast, extension: [0, 0]}\n"
CYCLE = """\
objective: {name: cycleacr, pixels: imagenet, test_boxes: truth, metric: slowfast, dim: 64, hidden: 128, dropout: 0,
            extension: [0, 0], max_persons: 4, memory: MEMORY}
"""
NO_MEMORY = "{past: 0, future: 0, max_per_second: 2}"
#: Every fifth second: the one that counts is among few.
MEMORY = "{past: 4, rate: 5, future: 0, max_per_second: 1}"


@dataclass(frozen=True)
class Run:
    """A recipe, and what is changed in it."""

    name: str
    recipe: str
    words: tuple[str, ...] = ()


#: Films of each set to train on, and to judge by.
FILMS = {"alone": (400, 160), "others": (300, 60), "before": (30, 8)}
RUNS: dict[str, list[Run]] = {
    "alone": [Run("evad_0.7", EVAD), Run("evad_unpruned", EVAD, ("model.keep_rate=1",))],
    # A single block sees the other person too, but finds out later what the two have in common.
    "others": [
        Run("plain", BACKBONE + PLAIN, ("model.depth=1", "schedule.steps=200")),
        Run("cycleacr", BACKBONE + CYCLE.replace("MEMORY", NO_MEMORY), ("model.depth=1", "schedule.steps=200")),
        Run("plain_long", BACKBONE + PLAIN, ("model.depth=1", "schedule.steps=300")),
        Run("cycleacr_long", BACKBONE + CYCLE.replace("MEMORY", NO_MEMORY), ("model.depth=1", "schedule.steps=300")),
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


def make_shards(kind: str, folder: Path, videos: Path) -> Path:
    """Draw and pack the films of a set over these videos, unless they are there."""
    shards = folder / "shards"
    if (shards / "val" / "index.json").is_file():
        return shards
    counts = (str(word) for pair in zip(("--train", "--val"), FILMS[kind], strict=True) for word in pair)
    command("bench/figures.py", kind, str(folder), "--backgrounds", str(videos), *counts)
    for part in ("train", "val"):
        names = () if part == "train" else ("--labels", str(shards / "train" / "classes.json"))
        given = ("--annotations", str(folder / f"{part}.csv"), "--data-root", str(folder / part))
        command("launch/pack.py", "--task", "detection", *given, str(shards / part), "--span", "1", "--copy", *names)
    return shards


def train(run: Run, shards: Path, folder: Path) -> dict[str, Any]:
    """Train and test, unless it is done; seconds of all of it, and scores in percent, also of each action."""
    done = folder / "result.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "own.yaml"
    recipe.write_text(COMMON.replace("SHARDS", str(shards)) + run.recipe, encoding="utf-8")
    began = time.monotonic()
    command("launch/finetune.py", "--recipe", str(recipe), *run.words, f"run.dir={folder / 'run'}")
    (tested,) = (folder / "run" / "predictions").iterdir()
    with (tested / "per_class.csv").open(newline="", encoding="utf-8") as file:
        classes = {row["class"]: float(row["average_precision"]) for row in csv.DictReader(file)}
    scores = json.loads((tested / "scores.json").read_text(encoding="utf-8"))
    result = {"seconds": round(time.monotonic() - began), "mAP": scores["mAP"], "classes": classes}
    done.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Lay the results of sets and their runs out."""
    lines = ["| set | run | frame-mAP@0.5 | of each action | training and test |", "|---|---|---|---|---|"]
    for kind, runs in results.items():
        for name, one in runs.items():
            each = ", ".join(f"{action} {value:.1f}" for action, value in one["classes"].items())
            lines.append(f"| {kind} | {name} | {one['mAP']:.1f} | {each} | {one['seconds']} s |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", default=list(RUNS), help="default: all")
    parser.add_argument("--backgrounds", type=Path, default=Path(".cache/demo/camera"), help="folder of videos")
    parser.add_argument("--work", type=Path, default=Path("runs/detection_learning"), help="folder of films and runs")
    parser.add_argument("--only", help="name of a single run")
    options = parser.parse_args()
    if unknown := set(options.sets) - set(RUNS):
        parser.error(f"sets: found {', '.join(sorted(unknown))}, allowed: {', '.join(RUNS)}")
    work, videos = options.work.absolute(), options.backgrounds.absolute()
    results = {}
    for kind in options.sets:
        shards = make_shards(kind, work / kind, videos)
        chosen = [run for run in RUNS[kind] if options.only in (None, run.name)]
        results[kind] = {run.name: train(run, shards, work / kind / run.name) for run in chosen}
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    print(table(results))


if __name__ == "__main__":
    main()
