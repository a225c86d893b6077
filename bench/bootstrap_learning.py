"""Does bootstrapping keep a teacher's accuracy? A ViT trained on digits, and a SparseFormer aligned without labels.

python bench/picture_sets.py digits PICTURES
python launch/pack.py PICTURES/train SHARDS/digits --kind image
python launch/pack.py PICTURES/test SHARDS/digits_test --kind image
python bench/bootstrap_learning.py SHARDS [--work FOLDER]

By the product's commands, which are printed: finetune.py trains the teacher with labels, pretrain.py the student
without them, zero_shot.py compares both on pictures that neither has seen, by the teacher's own head, which the student
inherits and which is frozen. Then forward passes of both are timed in turns in one process, with one thread. What was
stopped goes on where it was when the same line is typed again. Results go to bench/results/ with machine and date.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

COMMON = """\
  lanes: 4
  shuffle_window: 400
  workers: 0
batch: {samples: 32, micro: 32, ranks: 1}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_epochs: 4, keep_last: 1}
log: {every_steps: 25, pictures_every_steps: 0, wandb: disabled}
"""
TEACHER = """\
model: {name: image_vit, image_size: 16, patch_size: 4, dim: 64, depth: 6, heads: 1, classes: 10}
objective: {name: classification, smoothing: 0}
input: {name: picture, height: 16, width: 16, crop_share: 1}
optim: {base_lr: 2e-3, base_batch: 32, base_min_lr: 1e-5, layer_decay: 1, clip_grad: 1}
schedule: {epochs: EPOCHS, warmup_epochs: 1}
augment: {randaugment: null, area: [0.8, 1.0], erasing: 0, mixup: 0, cutmix: 0}
evaluate: {every_epochs: 7, clips: 1, crops: 1, micro: 100, workers: 0}
data:
  sources: {digits: {shards: SHARDS/digits, val: SHARDS/digits_test, flip: false}}
"""
#: Four of the teacher's six blocks behind four tokens and the class token. It looks at a map of a quarter of the
#: picture's sides, so it is given the same digits enlarged.
STUDENT = """\
model: {name: sparseformer, size: custom, form: bootstrapped, tokens: 4, focus_dim: 64, dim: 64, depth: 4, repeats: 2,
        points: 8, channels: 16, generator_dim: 64, classes: 10, norm_eps: 1e-6}
objective:
  name: bootstrap
  tune_blocks: 2
  teacher:
    weights: TEACHER_RUN
    dtype: fp32
    arguments: [embed_dim=64, depth=6, num_heads=1, img_size=16, patch_size=4]
    mean: [0.485, 0.456, 0.406]  # image_vit's, not those that timm names for its own weights
    std: [0.229, 0.224, 0.225]
input: {name: shared_crop, height: 32, width: 32, second_size: 16, area: [0.8, 1.0], flip: false, crop_share: 1}
optim: {base_lr: 2e-3, base_batch: 32, base_min_lr: 1e-5, betas: [0.9, 0.999], clip_grad: 1}
schedule: {epochs: EPOCHS, warmup_epochs: 1}
run: {init_weights: "${objective.teacher.weights}"}
data:
  sources: {digits: {shards: SHARDS/digits}}
"""
#: What zero_shot.py prints: a number and its name.
SCORE = re.compile(r"^ +(-?[\d.]+)  (.+)$", re.MULTILINE)


def command(*words: str) -> str:
    """Run one of the product's commands; returns what it prints.

    Raises:
        SystemExit: it failed.
    """
    print("$", *words, flush=True)
    environ = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | os.environ
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(words)}")
    return done.stdout


def train(script: str, text: str, run: Path) -> float:
    """Train by a recipe's text, or go on; returns the seconds that this took."""
    run.parent.mkdir(parents=True, exist_ok=True)
    recipe = run.with_suffix(".yaml")
    recipe.write_text(text + COMMON, encoding="utf-8")
    began = time.monotonic()
    command(script, "--recipe", str(recipe), f"run.dir={run}")
    return round(time.monotonic() - began)


def costs(student: Path, teacher: Path, batch: int = 100, rounds: int = 9) -> dict[str, dict[str, float]]:
    """Parameters, millions of multiply-accumulates of a picture, and pictures a second of one thread, of both."""
    import torch

    sys.path.insert(0, str(ROOT))
    from finetune.recipe import load_tune_recipe
    from pretrain.objectives.base import method_of
    from pretrain.recipe.load import load_recipe

    torch.set_num_threads(1)
    recipes = {"teacher": load_tune_recipe(str(teacher)), "student": load_recipe(str(student))}
    methods = {name: method_of(recipe) for name, recipe in recipes.items()}
    models = {name: method.architecture.build().eval() for name, method in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, model in models.items():
                side = recipes[name].input.height
                pictures = torch.randn(batch, 1, side, side, 3)
                began = time.process_time()
                model(pictures)
                times[name].append(time.process_time() - began)
    return {
        name: {
            "parameters": sum(value.numel() for value in model.parameters()),
            "mmac": methods[name].architecture.cost().executed / 1e6,
            "pictures_per_s": round(batch / statistics.median(times[name][1:])),
        }
        for name, model in models.items()
    }


def main() -> None:
    """Run the command line."""
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder with digits and digits_test, packed")
    parser.add_argument("--work", type=Path, default=Path("runs/bootstrap_learning"), help="recipes and runs")
    parser.add_argument("--teacher-epochs", type=int, default=14, help="of the teacher's training, 45 steps each")
    parser.add_argument("--epochs", type=int, default=8, help="of the alignment")
    options = parser.parse_args()
    work, shards = options.work.absolute(), str(options.shards.absolute())
    teacher, student = work / "teacher", work / "student"
    texts = [text.replace("SHARDS", shards).replace("TEACHER_RUN", str(teacher)) for text in (TEACHER, STUDENT)]
    epochs = (options.teacher_epochs, options.epochs)
    texts = [text.replace("EPOCHS", str(count)) for text, count in zip(texts, epochs, strict=True)]
    seconds = {"teacher": train("launch/finetune.py", texts[0], teacher)}
    seconds["student"] = train("launch/pretrain.py", texts[1], student)
    told = command("launch/zero_shot.py", str(student), f"{shards}/digits_test")
    facts: dict[str, Any] = {"date": today, "machine": platform.processor() or platform.machine()}
    facts |= {"epochs": dict(zip(seconds, epochs, strict=True)), "seconds_of_this_start": seconds}
    facts |= {"scores": {name: float(value) for value, name in SCORE.findall(told)}}
    facts |= costs(student.with_suffix(".yaml"), teacher.with_suffix(".yaml"))
    print(json.dumps(facts, indent=1))
    out = ROOT / "bench" / "results" / f"bootstrap_learning_{today}.json"
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
