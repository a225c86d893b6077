"""Does detection learn? Stamps composited over photographs, with exact boxes and masks, by the product's commands.

python bench/picture_sets.py stamps STAMPS; python bench/picture_sets.py photographs PHOTOGRAPHS
python bench/instance_learning.py STAMPS PHOTOGRAPHS [--work FOLDER] [--only RUN]

A picture is a tile of a photograph with one to three stamps on it, larger and smaller, over one another; an object's
mask is what of its stamp is opaque and not behind a later one, and its box is that mask's. Stamps and tiles of the
sets' test halves are seen in no training. Results go to bench/results/ with the machine and the date.
"""

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from bench.segmentation_learning import command  # noqa: E402
from pretrain.data.instance_masks import runs_of  # noqa: E402

SIDE, STAMPS_EACH, SIDES = 64, 3, (20, 40)
#: Transparency from which on a pixel is the stamp's, and pixels that must be seen of one.
OPAQUE, SEEN = 128, 30

COMMON = """\
objective: {name: coco, channels: 32, anchor: 8, boxes: 32, box_channels: 64, mask_channels: 16, most: 10}
input: {short_side: 64, long_side: 64, train_sides: [56, 64, 72], colour: hsv}
data:
  sources: {stamps: {shards: SHARDS/train, val: SHARDS/val, labels: SHARDS/classes.json}}
  lanes: 4
  shuffle_window: 64
  workers: 0
batch: {samples: 8, micro: 8}
optim: {scaled: none, base_lr: 3e-3, layer_decay: 1, weight_decay: 0.05}
schedule: {epochs: EPOCHS, warmup_epochs: 0.5}
evaluate: {every_epochs: 100, workers: 0, test: last}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_epochs: 100, keep_last: 1}
log: {every_steps: 10, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""
RUNS = {
    "groupmixformer": "model: {name: groupmixformer, size: custom, dims: [20, 40, 60, 80], depths: [1, 1, 1, 1], "
    "mlp_ratios: [4, 4, 4, 4], drop_path: 0, classes: CLASSES}\n",
    "image_vit": "model: {name: image_vit, image_size: 64, patch_size: 8, dim: 72, depth: 4, heads: 4, "
    "classes: CLASSES}\n",
}


#: A step that changes nothing: what the drawn weights are worth.
UNTRAINED = ("optim.base_lr=1e-12", "optim.base_min_lr=0", "schedule.epochs=0.1", "schedule.warmup_epochs=0")


def composite(
    stamps: list[tuple[int, Path]], tiles: list[Path], rng: np.random.Generator
) -> tuple[Any, list[dict[str, Any]]]:
    """Draw a picture, and say what is in it as COCO does."""
    with Image.open(tiles[rng.integers(len(tiles))]) as tile:
        picture = tile.convert("RGB").resize((SIDE, SIDE))
    owner, classes = np.zeros((SIDE, SIDE), np.uint8), []
    count = int(rng.integers(1, STAMPS_EACH + 1))
    for place, (number, path) in enumerate((stamps[index] for index in rng.integers(len(stamps), size=count)), 1):
        with Image.open(path) as image:
            stamp = image.convert("RGBA")
        longest = int(rng.integers(SIDES[0], SIDES[1] + 1))
        size = tuple(max(1, round(side * longest / max(stamp.size))) for side in stamp.size)
        stamp = stamp.resize((size[0], size[1]))
        x, y = (int(rng.integers(SIDE - side + 1)) for side in stamp.size)
        picture.paste(stamp, (x, y), stamp)
        opaque = np.asarray(stamp)[:, :, 3] >= OPAQUE
        owner[y : y + stamp.height, x : x + stamp.width][opaque] = place
        classes.append(number)
    return picture, [seen for place, number in enumerate(classes, 1) for seen in visible(owner == place, number)]


def visible(mask: Any, category: int) -> list[dict[str, Any]]:
    """Annotate what is seen of a stamp; nothing where that is too little."""
    if mask.sum() < SEEN:
        return []
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    segmentation = {"size": [SIDE, SIDE], "counts": runs_of(mask)}
    return [{"category_id": category, "bbox": box, "area": float(mask.sum()), "iscrowd": 0,
             "segmentation": segmentation}]  # fmt: skip


def make_shards(stamps: Path, photographs: Path, folder: Path, counts: dict[str, int], only: int) -> Path:
    """Draw and pack the pictures, unless they are there; of the first `only` classes of stamps."""
    shards = folder / "shards"
    if (shards / "val" / "index.json").is_file():
        return shards
    classes = sorted(path.name for path in (stamps / "train").iterdir())[:only]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
    for split, half in (("train", "train"), ("val", "test")):
        found = [(number, path) for number, name in enumerate(classes, 1)
                 for path in sorted((stamps / half / name).glob("*.png"))]  # fmt: skip
        tiles, rng = sorted((photographs / half).rglob("*.png")), np.random.default_rng(len(split))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index in range(counts[split]):
            picture, objects = composite(found, tiles, rng)
            name = f"{index:05d}.png"
            picture.save(folder / split / name)
            images.append({"id": index, "file_name": name, "height": SIDE, "width": SIDE})
            for one in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index, **one})
        path = folder / f"instances_{split}.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        source = (str(path), str(shards / split), "--data-root", str(folder / split))
        command("launch/pack.py", *source, "--with", "objects", "--workers", "0")
    (shards / "classes.json").write_text(json.dumps({"categories": categories}), encoding="utf-8")
    return shards


def train(name: str, shards: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """Train and test; seconds and scores of the trained model, and of one that has not learned."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, classes = folder / "own.yaml", len(json.loads((shards / "classes.json").read_text())["categories"])
    text = (RUNS[name] + COMMON).replace("SHARDS", str(shards)).replace("EPOCHS", str(epochs))
    recipe.write_text(text.replace("CLASSES", str(classes)), encoding="utf-8")
    began, scores = time.monotonic(), {}
    for run, words in (("run", ()), ("untrained", UNTRAINED)):
        command("launch/finetune.py", "--recipe", str(recipe), f"run.dir={folder / run}", *words)
        (path,) = (folder / run / "predictions").glob("*/scores.json")
        scores[run] = json.loads(path.read_text())
    seconds = round(time.monotonic() - began)
    return {"run": name, "seconds": seconds, **scores["run"], "untrained": scores["untrained"]}


def main() -> None:
    """Run the command line."""
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path, help="class folders of stamps, as picture_sets.py writes them")
    parser.add_argument("photographs", type=Path, help="class folders of photographs")
    parser.add_argument("--work", type=Path, default=Path("runs/instance_learning"), help="pictures and runs")
    parser.add_argument("--train", type=int, default=400, help="pictures to train on (default 400)")
    parser.add_argument("--val", type=int, default=100, help="pictures to judge by (default 100)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over them (default 12)")
    parser.add_argument("--classes", type=int, default=8, help="classes of stamps, by name (default 8, all)")
    parser.add_argument("--only", choices=sorted(RUNS), help="name of a single run")
    options = parser.parse_args()
    work, counts = options.work.absolute(), {"train": options.train, "val": options.val}
    shards = make_shards(options.stamps, options.photographs, work, counts, options.classes)
    found = [train(name, shards, work / name, options.epochs) for name in RUNS if options.only in (None, name)]
    facts = {"date": today, "machine": platform.processor() or platform.machine(), **counts, "epochs": options.epochs,
             "classes": options.classes, "runs": found}  # fmt: skip
    print(json.dumps(facts, indent=1))
    out = ROOT / "bench" / "results" / f"instance_learning_{today}.json"
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
