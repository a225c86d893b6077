"""Does segmentation learn? Stamps composited over photographs, with exact masks, by the product's commands.

python bench/picture_sets.py stamps STAMPS; python bench/picture_sets.py photographs PHOTOGRAPHS
python bench/segmentation_learning.py STAMPS PHOTOGRAPHS [--work FOLDER] [--only RUN]

A picture is a tile of a photograph with three stamps on it, larger and smaller, over one another; its mask is what of
the stamps is opaque. Stamps and tiles of the sets' test halves are seen in no training. Results go to bench/results/
with the machine and the date.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIDE, STAMPS_EACH, SIDES = 64, 3, (20, 40)
#: Transparency from which on a pixel is the stamp's.
OPAQUE = 128

COMMON = """\
objective: {name: segmentation, channels: 32}
input: {short_side: 64, crop_size: 64, scale: [0.8, 1.25], colour: hsv, max_class_share: 1}
data:
  sources: {stamps: {shards: SHARDS/train, val: SHARDS/val, labels: SHARDS/classes.txt}}
  lanes: 4
  shuffle_window: 64
  workers: 0
batch: {samples: 16, micro: 16}
optim: {base_lr: 2e-3, base_batch: 16, layer_decay: 1}
schedule: {epochs: EPOCHS, warmup_epochs: 1}
evaluate: {every_epochs: 4, workers: 0, test: last}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_epochs: 100, keep_last: 1}
log: {every_steps: 25, pictures_every_steps: 0, wandb: disabled}
"""
#: Backbones of 6 and 20 MMAC at 64 pixels, of 20 and 82 with their heads.
RUNS = {
    "groupmixformer": "model: {name: groupmixformer, size: custom, dims: [20, 40, 60, 80], depths: [1, 1, 2, 1], "
    "mlp_ratios: [4, 4, 4, 4], drop_path: 0, classes: CLASSES}\n",
    "image_vit": "model: {name: image_vit, image_size: 64, patch_size: 8, dim: 72, depth: 4, heads: 4, "
    "classes: CLASSES}\n",
}


def composite(stamps: list[tuple[int, Path]], tiles: list[Path], rng: np.random.Generator) -> tuple[Any, Any]:
    """Draw a picture and its mask: 0 is the ground, n the n-th class of stamps."""
    with Image.open(tiles[rng.integers(len(tiles))]) as tile:
        picture = tile.convert("RGB").resize((SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for number, path in (stamps[index] for index in rng.integers(len(stamps), size=STAMPS_EACH)):
        with Image.open(path) as image:
            stamp = image.convert("RGBA")
        longest = int(rng.integers(SIDES[0], SIDES[1] + 1))
        size = tuple(max(1, round(side * longest / max(stamp.size))) for side in stamp.size)
        stamp = stamp.resize((size[0], size[1]))
        x, y = (int(rng.integers(SIDE - side + 1)) for side in stamp.size)
        picture.paste(stamp, (x, y), stamp)
        opaque = np.asarray(stamp)[:, :, 3] >= OPAQUE
        mask[y : y + stamp.height, x : x + stamp.width][opaque] = number
    return picture, Image.fromarray(mask)


def make_shards(stamps: Path, photographs: Path, folder: Path, counts: dict[str, int]) -> Path:
    """Draw and pack the pictures, unless they are there."""
    shards = folder / "shards"
    if (shards / "val" / "index.json").is_file():
        return shards
    classes = sorted(path.name for path in (stamps / "train").iterdir())
    for split, half in (("train", "train"), ("val", "test")):
        found = [(number, path) for number, name in enumerate(classes, 1)
                 for path in sorted((stamps / half / name).glob("*.png"))]  # fmt: skip
        tiles, rng = sorted((photographs / half).rglob("*.png")), np.random.default_rng(len(split))
        for index in range(counts[split]):
            for kind, image in zip(("images", "annotations"), composite(found, tiles, rng), strict=True):
                path = folder / kind / split / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        source = (str(folder / "images" / split), str(shards / split), "--kind", "image", "--no-labels")
        masks = f"mask.png={folder / 'annotations' / split}"
        command("launch/pack.py", *source, "--with", masks, "--workers", "0")
    (shards / "classes.txt").write_text("".join(f"{name}\n" for name in ("ground", *classes)), encoding="utf-8")
    return shards


def command(*words: str) -> None:
    """Run one of the product's commands.

    Raises:
        SystemExit: it failed.
    """
    print("$", *words, flush=True)
    environ = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | os.environ
    if subprocess.run([sys.executable, *words], cwd=ROOT, env=environ).returncode:
        raise SystemExit(f"failed: {' '.join(words)}")


def train(name: str, shards: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """Train and test; seconds and scores."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, classes = folder / "own.yaml", len((shards / "classes.txt").read_text(encoding="utf-8").splitlines())
    text = (RUNS[name] + COMMON).replace("SHARDS", str(shards)).replace("EPOCHS", str(epochs))
    recipe.write_text(text.replace("CLASSES", str(classes)), encoding="utf-8")
    began = time.monotonic()
    command("launch/finetune.py", "--recipe", str(recipe), f"run.dir={folder / 'run'}")
    (scores,) = (folder / "run" / "predictions").glob("*/scores.json")
    return {"run": name, "seconds": round(time.monotonic() - began), **json.loads(scores.read_text())}


def main() -> None:
    """Run the command line."""
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path, help="class folders of stamps, as picture_sets.py writes them")
    parser.add_argument("photographs", type=Path, help="class folders of photographs")
    parser.add_argument("--work", type=Path, default=Path("runs/segmentation_learning"), help="pictures and runs")
    parser.add_argument("--train", type=int, default=400, help="pictures to train on (default 400)")
    parser.add_argument("--val", type=int, default=100, help="pictures to judge by (default 100)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over them (default 12)")
    parser.add_argument("--only", choices=sorted(RUNS), help="name of a single run")
    options = parser.parse_args()
    work, counts = options.work.absolute(), {"train": options.train, "val": options.val}
    shards = make_shards(options.stamps, options.photographs, work, counts)
    found = [train(name, shards, work / name, options.epochs) for name in RUNS if options.only in (None, name)]
    facts = {"date": today, "machine": platform.processor() or platform.machine(), **counts, "epochs": options.epochs,
             "runs": found}  # fmt: skip
    print(json.dumps(facts, indent=1))
    out = ROOT / "bench" / "results" / f"segmentation_learning_{today}.json"
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
