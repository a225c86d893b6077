"""Do TDN's modules learn what they are for? Order and speed of action clips, against the same network without them.

python bench/tdn_learning.py [--steps N] [--only RUN] [--out FILE]
A film shows two actions one after the other; its class is which came first, and whether both run three times as fast:
single frames tell neither. Training and held-out films are of other performers (tests/assets/actions). Frames are
chosen, cropped and normalised by the product's own functions, and steps are plain SGD in this process, on one thread.
"""

import argparse
import csv
import datetime
import json
import platform
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.nn import functional as F

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.models.tdn import TDN, Config
from pretrain.samples import segments, transforms
from pretrain.samples.frame_choice import VideoFacts

ROOT = Path(__file__).resolve().parents[1]
ACTIONS = ("biking", "swimming")
#: Frames of each action in a film, side of its pictures, and of those that the network sees.
HALF, SIDE, CROP = 20, 56, 48
#: Films of each of the four classes.
FILMS = {"train": 60, "test": 30}
MODEL = Config(width=16, blocks=[1, 1, 1, 1], classes=4, dropout=0.2)
INPUT = segments.Config(segments=4, height=CROP, width=CROP)
BATCH, RATE, DECAY, CLIP = 16, 0.02, 5e-4, 20.0
RUNS: dict[str, dict[str, Any]] = {
    "without modules": {"short_term": False, "long_term": False, "temporal": False},
    "TDN": {},
    "short-term only": {"long_term": False, "temporal": False},
    "long-term and temporal only": {"short_term": False},
}


def action_clips(split: str) -> list[list[np.ndarray]]:
    """Read the clips of both actions, uint8 [frames, SIDE, SIDE, 3] each."""
    folder = ROOT / "tests" / "assets" / "actions"
    with open(folder / "manifest.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split and row["label"] in ACTIONS]
    found: list[list[np.ndarray]] = [[] for _ in ACTIONS]
    for row in rows:
        with av.open(folder / row["path"]) as container:
            frames = [frame.to_ndarray(format="rgb24", width=SIDE, height=SIDE) for frame in container.decode(video=0)]
        found[ACTIONS.index(row["label"])].append(np.stack(frames))
    return found


def films_of(split: str) -> tuple[list[np.ndarray], torch.Tensor]:
    """Make the films [2 HALF, SIDE, SIDE, 3] of a split and their classes; seeded."""
    clips, rng = action_clips(split), np.random.default_rng(len(split))
    films, classes = [], []
    for (order, fast), _ in product(product((0, 1), (0, 1)), range(FILMS[split])):
        pair = [clips[action][rng.integers(len(clips[action]))] for action in (order, 1 - order)]
        steps = np.arange(HALF) * (3 if fast else 1)
        # From a random frame on; where a clip ends it begins again.
        films.append(np.concatenate([clip[(rng.integers(len(clip)) + steps) % len(clip)] for clip in pair]))
        classes.append(2 * order + fast)
    return films, torch.tensor(classes)


def clip_of(film: np.ndarray, rng: np.random.Generator | None) -> torch.Tensor:
    """Cut a clip of segments out of a film: at random, or in the middle without a generator."""
    choice, video = INPUT.frame_choice("sparse", None), VideoFacts(len(film))
    if rng is None:
        return torch.from_numpy(transforms.centre_crop(film[choice.validation(video)], CROP, CROP))
    box = transforms.multiscale_box(SIDE, SIDE, CROP, CROP, rng)
    return torch.from_numpy(transforms.crop_resize(film[choice.training(video, rng)], box, CROP, CROP))


def train(options: dict[str, Any], steps: int) -> dict[str, float]:
    """Train on films and judge held-out ones: accuracy in percent of class, order and speed; seconds."""
    torch.manual_seed(0)
    rng, began = np.random.default_rng(0), time.process_time()
    model, normalization = TDN(replace(MODEL, **options), INPUT.segments), PixelNormalization()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps * 6 // 10, steps * 85 // 100])
    films, classes = films_of("train")
    for _ in range(steps):
        rows = rng.integers(len(films), size=BATCH)
        clips = normalization(unit_pixels(torch.stack([clip_of(films[row], rng) for row in rows])))
        loss = F.cross_entropy(model(clips), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return judged(model.eval(), normalization) | {"loss": float(loss.detach()), "seconds": time.process_time() - began}


@torch.no_grad()
def judged(model: TDN, normalization: PixelNormalization) -> dict[str, float]:
    """Judge held-out films, one middle clip each."""
    films, classes = films_of("test")
    clips = torch.stack([clip_of(film, None) for film in films])
    found = torch.cat([model(normalization(unit_pixels(part))).argmax(1) for part in clips.split(BATCH)])
    right = {"class": found == classes, "order": found // 2 == classes // 2, "speed": found % 2 == classes % 2}
    return {name: 100 * float(one.float().mean()) for name, one in right.items()}


def main() -> None:
    """Run the command line."""
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of 16 films (default 100)")
    parser.add_argument("--only", choices=sorted(RUNS), help="a single run")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"tdn_learning_{today}.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"date": today, "machine": platform.processor() or platform.machine(), "runs": {}}
    for name, changes in RUNS.items():
        if options.only in (None, name):
            facts["runs"][name] = train(changes, options.steps)
            print(name, {key: round(value, 2) for key, value in facts["runs"][name].items()}, flush=True)
            options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
