"""Does sampling by motion help where the action is brief? One tiny ViT, equal frames, two rules for choosing them.

python bench/motion_learning.py [--pictures FOLDER] [--seeds 0 1 2]
A film of 120 frames is one of 13 still photographs (python bench/picture_sets.py photographs FOLDER; else drawn
textures), others for judging than for training. Once, for 14 frames at any time, a white disc crosses it in one of four
directions, which is its class. Nothing is left of it before and after, and no single frame tells its direction. Films
are coded with H.264, so that stills flicker as they do in real ones. All in one process, frames in memory: a recipe's
model, objective and rules for frames; what differs between runs is the rule alone. Results go to bench/results/ with
the machine and the date.
"""

import argparse
import datetime
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench.learning import machine
from finetune.recipe import load_tune_recipe
from pretrain.data.decoders import open_video
from pretrain.objectives.base import method_of
from pretrain.samples.frame_choice import FrameChoice, VideoFacts
from pretrain.samples.motion_curves import Curve, measure_of, motion_curve
from pretrain.samples.transforms import Clip, centre_crop

ROOT = Path(__file__).resolve().parents[1]
SIDE, FRAMES, RADIUS = 48, 120, 7
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
#: Frames that the disc takes to cross.
LENGTH = 14
#: Side of what is cut out of a frame (anywhere in training), side of a clip, frames of it, and films in a step.
CUT, CLIP, CHOSEN, BATCH = 40, 32, 8, 16
#: Backgrounds; of no divisor with the classes, so that each comes with all of them.
GROUNDS = 13
RULES = {
    "uniform in time (sparse)": ("sparse", ()),
    "equal shares of motion": ("motion", ()),
}
MODEL = (
    *("model.size=custom", "model.patch_size=8", "model.dim=64", "model.depth=2", "model.heads=4", "model.mlp_ratio=2"),
    *("model.classes=4", "model.drop_path=0", "objective.smoothing=0", "augment.mixup=0", "augment.cutmix=0"),
    *(f"input.frames={CHOSEN}", f"input.height={CLIP}", f"input.width={CLIP}"),
)


@dataclass(frozen=True)
class Film:
    """A decoded film uint8 [FRAMES, SIDE, SIDE, 3], its motion, and its class."""

    frames: Clip
    motion: Curve
    target: int

    def clip(self, choice: FrameChoice, rng: np.random.Generator | None) -> torch.Tensor:
        """Cut a clip of training, or without a generator that of the test."""
        facts = VideoFacts(len(self.frames), self.motion)
        chosen = choice.validation(facts) if rng is None else choice.training(facts, rng)
        free = SIDE - CUT
        x, y = (free // 2, free // 2) if rng is None else rng.integers(0, free + 1, 2).tolist()
        return torch.from_numpy(centre_crop(self.frames[chosen, y : y + CUT, x : x + CUT], CLIP, CLIP))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="class folders train/ and test/ (default: drawn textures)")
    parser.add_argument("--train", type=int, default=128, help="films to train on (default 128)")
    parser.add_argument("--val", type=int, default=80, help="films to judge by (default 80)")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = [make_films(options.pictures, *split) for split in (("train", options.train), ("test", options.val))]
    found = []
    for seed in options.seeds:
        for name in RULES:
            found.append(run(name, seed, options.epochs, *sets))
            print(found[-1], flush=True)
    today = datetime.date.today().isoformat()
    report = {"date": today, "machine": machine(), "films": [options.train, options.val], "epochs": options.epochs,
              "pictures": "photographs" if options.pictures else "textures", "runs": found}  # fmt: skip
    out = ROOT / "bench" / "results" / f"motion_learning_{today}.json"
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(table(report)))


def make_films(pictures: Path | None, split: str, count: int) -> list[Film]:
    """Draw, code and decode films, and measure their motion."""
    grounds, rng, films = backgrounds(pictures, split)[:GROUNDS], np.random.default_rng(split == "train"), []
    for number in range(count):
        target = number % len(DIRECTIONS)
        data = encoded(film(grounds[number % GROUNDS], list(DIRECTIONS)[target], rng))
        with open_video(data, "pyav") as reader:
            frames = np.stack(list(reader.in_turn()))
        films.append(Film(frames, motion_curve(frames, measure_of("ssim")), target))
    return films


def backgrounds(pictures: Path | None, split: str) -> list[np.ndarray]:
    """Pictures uint8 [SIDE, SIDE, 3]: other ones for judging than for training."""
    if pictures is None:
        rng = np.random.default_rng(7 if split == "train" else 8)
        coarse = rng.integers(0, 256, (80, 6, 6, 3), dtype=np.uint8)
        return [np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for one in coarse]
    files = sorted((pictures / split).rglob("*.png"))
    order = np.random.default_rng(0).permutation(len(files))
    return [np.asarray(Image.open(files[index]).convert("RGB").resize((SIDE, SIDE))) for index in order]


def film(ground: np.ndarray, direction: str, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Frames uint8 [SIDE, SIDE, 3]."""
    start = int(rng.integers(4, FRAMES - LENGTH - 4))
    lane = int(rng.integers(RADIUS, SIDE - RADIUS))
    dx, dy = DIRECTIONS[direction]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number in range(FRAMES):
        picture = ground.copy()
        if 0 <= number - start < LENGTH:
            along = -RADIUS + (SIDE + 2 * RADIUS) * (number - start) / (LENGTH - 1)
            along = along if dx + dy > 0 else SIDE - along
            x, y = (along, lane) if dx else (lane, along)
            picture[(rows - y) ** 2 + (columns - x) ** 2 < RADIUS**2] = 255
        yield picture


def encoded(frames: Iterator[np.ndarray]) -> bytes:
    """An MP4 file."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = SIDE, SIDE, "yuv420p", 32
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def run(name: str, seed: int, epochs: int, train: list[Film], held_out: list[Film]) -> dict[str, Any]:
    """Train and test with one rule; top-1 of training clips in the last epoch, and of the films held out."""
    sampling, words = RULES[name]
    recipe = load_tune_recipe("demo_finetune", [*MODEL, *words])
    torch.manual_seed(seed)
    objective: Any = method_of(recipe).build()
    choice, rng, began = recipe.input.frame_choice(sampling, None), np.random.default_rng(seed), time.process_time()
    optimiser = torch.optim.AdamW(objective.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    right: list[float] = []
    for step in range(steps):
        if step % (len(train) // BATCH) == 0:
            order, right = rng.permutation(len(train)), []
        films = [train[index] for index in order[:BATCH]]
        order = np.roll(order, -BATCH)
        batch = {"video": torch.stack([one.clip(choice, rng) for one in films]),
                 "target": torch.tensor([one.target for one in films])}  # fmt: skip
        output = objective(batch)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        schedule.step()
        right.append(float(output.metrics["top1"]))
    objective.eval()
    answers = objective.predict(torch.stack([one.clip(choice, None) for one in held_out])).argmax(1)
    top1 = 100 * float((answers == torch.tensor([one.target for one in held_out])).float().mean())
    return {"run": name, "seed": seed, "seconds": round(time.process_time() - began), "top1": round(top1, 1),
            "training": round(statistics.mean(right), 1)}  # fmt: skip


def table(report: dict[str, Any]) -> list[str]:
    """Mean and standard deviation over seeds."""
    lines = ["| 8 frames of 120 | top-1 |", "|---|---|"]
    for name in RULES:
        values = [one["top1"] for one in report["runs"] if one["run"] == name]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {statistics.mean(values):.1f}{spread} % |")
    return lines


if __name__ == "__main__":
    main()
