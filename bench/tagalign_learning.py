"""Does TagAlign learn where things are from captions alone? Stamps composited over photographs, by our commands.

python bench/picture_sets.py stamps STAMPS; python bench/picture_sets.py photographs PHOTOGRAPHS
python bench/tagalign_learning.py STAMPS PHOTOGRAPHS [--work FOLDER]

A small CLIP is trained here on pictures and captions ("a bird and a vehicle"), since none can be downloaded. Then
captions become tags (launch/tag.py), TagAlign trains its projector (launch/pretrain.py), and class names are looked for
in pictures that nobody has trained on: new places, sizes and grounds, of the same two stamps a class. Judged are the
pixels of stamps, which of the classes each of them is; then all pixels, with the background at the threshold that is
best for each row. Results go to bench/results/ with the machine and the date.
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
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from bench.segmentation_learning import command, composite  # noqa: E402
from finetune.open_vocabulary.set_evaluation import evaluate_set, own_protocol  # noqa: E402
from finetune.open_vocabulary.text_segmenter import SegmenterOptions, TextSegmenter, open_segmenter  # noqa: E402
from pretrain.models import clip  # noqa: E402
from pretrain.objectives.contrast import both_directions, normalized, same_group  # noqa: E402
from pretrain.runtime.process_group import Ranks  # noqa: E402
from pretrain.samples.text import Tokenizer  # noqa: E402

#: Stamps of a class; more look too different for minutes of training.
EACH = 2
SIDE, BATCH = 64, 48
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
THRESHOLDS = (0.4, 0.6, 0.8, 0.95)
SIZES = {
    "size": "custom", "image_size": SIDE, "patch_size": 8, "dim": 48, "depth": 6, "heads": 4, "embedding": 48,
    "text_dim": 48, "text_depth": 1, "text_heads": 2, "activation": "quick_gelu", "context": 16,
}  # fmt: skip
#: Judged rows: share of CLIP's own masks.
ROWS = {"CLIP surgery alone": 1.0, "TagAlign, blend 0.3": 0.3, "TagAlign, projector alone": 0.0}
RECIPE = """\
model: {name: patch_projector, surgery_blocks: 4, clip: {SIZES}}
objective:
  name: tagalign
  towers: {weights: WORK/clip.safetensors, dtype: fp32}
  pixels: clip
input: {name: captioned, height: 64, width: 64, tokenizer: WORK/tokenizer.json, context: 16, tags: WORK/tags,
        tag_count: COUNT, augment: {randaugment: null, erasing: 0, area: [0.5, 1]}, colour_jitter: 0.2}
data: {sources: {stamps: {shards: WORK/shards/train}}, lanes: 4, shuffle_window: 64, workers: 0}
batch: {samples: 64, micro: 64}
optim: {base_lr: 2e-3, base_batch: 64, clip_grad: 5.0, betas: [0.9, 0.999]}
schedule: {steps: STEPS, warmup_epochs: 0, shape: constant}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_epochs: 1000, keep_last: 1}
log: {every_steps: 10, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
run: {init_weights: "${objective.towers.weights}"}
"""


def draw(stamps: Path, photographs: Path, work: Path, counts: dict[str, int]) -> list[str]:
    """Draw pictures, captions and masks, and pack them; returns the classes."""
    classes = sorted(path.name for path in (stamps / "train").iterdir())
    found = [(number, path) for number, name in enumerate(classes, 1)
             for path in sorted((stamps / "train" / name).glob("*.png"))[:EACH]]  # fmt: skip
    if (work / "shards" / "val" / "index.json").is_file():
        return classes
    for split, half in (("train", "train"), ("val", "test")):
        tiles, rng = sorted((photographs / half).rglob("*.png")), np.random.default_rng(len(split))
        for index in range(counts[split]):
            picture, mask = composite(found, tiles, rng)
            seen = [classes[number - 1] for number in np.unique(mask) if number]
            path = work / "images" / split / f"{index:05d}.png"
            place = work / "annotations" / split / path.name
            for one, image in ((path, picture), (place, mask)):
                one.parent.mkdir(parents=True, exist_ok=True)
                image.save(one)
            rng.shuffle(seen)
            path.with_suffix(".txt").write_text(" and ".join(f"a {name}" for name in seen), encoding="utf-8")
        beside = "txt" if split == "train" else f"mask.png={work / 'annotations' / split}"
        source = (str(work / "images" / split), str(work / "shards" / split), "--kind", "image", "--no-labels")
        command("launch/pack.py", *source, "--with", beside, "--workers", "0")
    return classes


def write_tokenizer(path: Path, classes: list[str]) -> int:
    """Write a tokenizer of words; returns its size."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "a", "and", "photo", "of", ".", *classes, "[BOS]", "[EOS]"]
    tokenizer = Words(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(name, words.index(name)) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=marks)
    tokenizer.save(str(path))
    return len(words)


def train_clip(work: Path, vocabulary: int, steps: int) -> dict[str, float]:
    """Train a small CLIP on whole pictures and their captions, and write it."""
    paths = sorted((work / "images" / "train").glob("*.png"))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in paths]
    # Captions of the same words in another order are the same.
    groups = torch.tensor([hash(frozenset(caption.split())) for caption in captions])
    ids = torch.from_numpy(Tokenizer(str(work / "tokenizer.json"), 16, too_long="refuse").encode(captions).ids)
    torch.manual_seed(0)
    model = clip.CLIP(clip.Config(**SIZES, vocabulary=vocabulary))  # type: ignore[arg-type]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.MEAN, clip.STD))
    draws, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        rows = torch.randint(len(paths), (BATCH,), generator=draws)
        images = (pixels[rows] / 255 - mean) / std
        if torch.rand((), generator=draws) < 0.5:
            images = images.flip(-1)
        shift = torch.randint(-8, 9, (2,), generator=draws).tolist()
        found = model(images.roll(shift, (-2, -1)), ids[rows])
        sides = both_directions(
            normalized(found.images), normalized(found.texts), found.scale.clamp(max=100), ALONE,
            excluded=same_group(groups[rows], ALONE),
        )  # fmt: skip
        loss = (sides[0].mean() + sides[1].mean()) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, work / "clip.safetensors")
    return {"first": sum(losses[:10]) / 10, "last": sum(losses[-10:]) / 10}


def judge(work: Path, run: Path, classes: list[str], blend: float) -> dict[str, float]:
    """Look for the classes: among pixels of stamps, and among all with the best threshold."""
    segmenter: TextSegmenter = open_segmenter(str(run), ALONE.device, SegmenterOptions(blend, SIDE))
    shards = str(work / "shards" / "val")
    things, _, _ = evaluate_set(segmenter, own_protocol(classes, False, 1, 255), classes, shards, 0, ALONE)
    protocol = own_protocol(classes, True, 0, 255)
    every = {one: evaluate_set(segmenter, protocol, classes, shards, one, ALONE)[0]["mIoU"] for one in THRESHOLDS}
    best = max(every, key=lambda one: every[one])
    return {"mIoU": things["mIoU"], "pixel_accuracy": things["pixel_accuracy"],
            "mIoU_with_background": every[best], "threshold": best}  # fmt: skip


def main() -> None:
    """Run the command line."""
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path, help="class folders of stamps, as picture_sets.py writes them")
    parser.add_argument("photographs", type=Path, help="class folders of photographs")
    parser.add_argument("--work", type=Path, default=Path("runs/tagalign_learning"), help="pictures and runs")
    parser.add_argument("--train", type=int, default=1000, help="captioned pictures (default 1000)")
    parser.add_argument("--val", type=int, default=60, help="pictures to judge by (default 60)")
    parser.add_argument("--clip-steps", type=int, default=600, help="of CLIP's training (default 600)")
    parser.add_argument("--steps", type=int, default=400, help="of TagAlign's training (default 400)")
    options = parser.parse_args()
    work = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    classes = draw(options.stamps, options.photographs, work, {"train": options.train, "val": options.val})
    vocabulary = write_tokenizer(work / "tokenizer.json", classes)
    facts: dict[str, Any] = {"date": today, "machine": platform.machine(), "train": options.train, "val": options.val}
    if not (work / "clip.safetensors").is_file():
        facts["clip_loss"] = train_clip(work, vocabulary, options.clip_steps)
    facts["clip_seconds"] = round(time.monotonic() - began)
    print(json.dumps(facts), flush=True)
    sizes = SIZES | {"vocabulary": vocabulary}
    words = [f"{key}={value}" for key, value in sizes.items()]
    embed = ("--clip", str(work / "clip.safetensors"), "--tokenizer", str(work / "tokenizer.json"), "--set", *words)
    command("launch/tag.py", str(work / "shards" / "train"), "--out", str(work / "tags"), *embed)
    count = len((work / "tags" / "tags.txt").read_text(encoding="utf-8").splitlines())
    text = RECIPE.replace("SIZES", ", ".join(f"{key}: {value}" for key, value in sizes.items()))
    for name, value in (("WORK", work), ("COUNT", count), ("STEPS", options.steps)):
        text = text.replace(name, str(value))
    (work / "own.yaml").write_text(text, encoding="utf-8")
    command("launch/pretrain.py", "--recipe", str(work / "own.yaml"), f"run.dir={work / 'run'}")
    facts |= {"seconds": round(time.monotonic() - began), "clip_steps": options.clip_steps, "steps": options.steps}
    facts["rows"] = {name: judge(work, work / "run", classes, blend) for name, blend in ROWS.items()}
    print(json.dumps(facts, indent=1))
    out = ROOT / "bench" / "results" / f"tagalign_learning_{today}.json"
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
