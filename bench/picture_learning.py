"""Do networks of about one cost learn real pictures? A ViT, a SparseFormer and a GroupMixFormer, by finetune.py.

python bench/picture_sets.py mnist PICTURES
python launch/pack.py PICTURES/train SHARDS/mnist --kind image
python launch/pack.py PICTURES/test SHARDS/mnist_test --kind image
python bench/picture_learning.py SHARDS [--work FOLDER] [--only RUN ...] [--epochs 12]

Handwritten digits (4,000 to train on, 1,000 to judge by), one seed, one thread a network, the recipe of demo_pictures.
Sizes are chosen so that a forward pass is about as many multiply-accumulates; the table says how many.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

RUNS = {
    "image_vit": "{name: image_vit, image_size: 28, patch_size: 4, dim: 64, depth: 4, heads: 2, classes: 10}",
    "sparseformer": "{name: sparseformer, size: custom, form: v1, tokens: 12, focus_dim: 64, dim: 128, depth: 2, "
    "repeats: 2, points: 16, channels: 32, classes: 10, drop_path: 0}",
    "groupmixformer": "{name: groupmixformer, size: custom, dims: [40, 80, 120, 160], depths: [2, 3, 4, 2], "
    "mlp_ratios: [4, 4, 4, 4], drop_path: 0, classes: 10}",
}
RECIPE = """\
model: {model}
objective: {{name: classification}}
input: {{name: picture, height: 28, width: 28, crop_share: 1}}
data:
  sources:
    mnist: {{shards: {shards}/mnist, val: {shards}/mnist_test, flip: false}}
  lanes: 4
  shuffle_window: 1000
  workers: 1
batch: {{samples: 64, micro: 64, ranks: 1}}
optim: {{base_lr: 2e-3, base_batch: 64, base_min_lr: 2e-5, layer_decay: 1, clip_grad: 5}}
schedule: {{epochs: {epochs}, warmup_epochs: 0.5}}
augment: {{randaugment: null, area: [0.7, 1.0], erasing: 0.1, mixup: 0, cutmix: 0}}
evaluate: {{every_epochs: 2, clips: 1, crops: 1, micro: 100, workers: 1}}
compute: {{dtype: fp32}}
zero: {{stage: 1}}
checkpoint: {{every_epochs: 100}}
log: {{every_steps: 31, pictures_every_steps: 0, wandb: disabled}}
"""


def main() -> None:
    """Train each network and print a line of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder with mnist and mnist_test, packed")
    parser.add_argument("--work", type=Path, default=Path(".cache/picture_learning"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()
    print("| network | parameters | MMAC a picture | top-1 | training and validation |")
    print("|---|---|---|---|---|", flush=True)
    for name in options.only:
        print(train(name, options), flush=True)


def train(name: str, options: argparse.Namespace) -> str:
    """Train a network in a fresh folder; returns its line."""
    folder = options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "own.yaml"
    shards = options.shards.absolute()
    recipe.write_text(RECIPE.format(model=RUNS[name], shards=shards, epochs=options.epochs), encoding="utf-8")
    run = folder / f"run_{time.strftime('%H%M%S')}"
    words = [sys.executable, "launch/finetune.py", "--recipe", str(recipe.absolute()), f"run.dir={run.absolute()}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [record["eval/top1"] for record in records if "eval/top1" in record]
    parameters, macs = sizes(recipe)
    return f"| {name} | {parameters:,} | {macs:.1f} | {scores[-1]:.1f} % | {seconds:.0f} s |"


def sizes(recipe: Path) -> tuple[int, float]:
    """Count a network's parameters, and the millions of multiply-accumulates of one picture."""
    import torch

    sys.path.insert(0, str(ROOT))
    from finetune.recipe import load_tune_recipe
    from pretrain.objectives.base import method_of

    method = method_of(load_tune_recipe(str(recipe)))
    with torch.device("meta"):
        model = method.architecture.build()
    return sum(value.numel() for value in model.parameters()), method.architecture.cost().executed / 1e6


if __name__ == "__main__":
    main()
