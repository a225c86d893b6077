"""Labelled shards of tiny videos, a tiny recipe over them, and running launch/finetune.py in this process."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toy_run import train
from tests.toy_shards import ROOT, encoded, index, write_shard

CLASSES = ("down", "left", "right")

RECIPE = """\
model: {name: classifier, size: custom, patch_size: 16, dim: 48, depth: 2, heads: 2, mlp_ratio: 2, classes: 3,
        drop_path: 0, head_init_scale: 1, positions: rebuild}
objective: {name: classification}
input:
  frames: 4
  stride: 2
  height: 32
  width: 32
  decoder: pyav
data:
  sources: {toy: {shards: FOLDER/train, val: FOLDER/val, flip: false}}
  lanes: 4
  shuffle_window: 4
  workers: 0
batch: {samples: 8, micro: 4}
optim: {base_lr: 0.1, base_min_lr: 0.001, layer_decay: 0.9}
schedule: {epochs: 2, warmup_epochs: 0.5}
augment: {area: [0.6, 1.0]}
evaluate: {every_epochs: 0.5, clips: 2, crops: 3, micro: 5, workers: 0}
compute: {dtype: fp32}
zero: {stage: 0}
checkpoint: {every_steps: 2, keep_last: 1}
log: {every_steps: 1, pictures_every_steps: 0, wandb: disabled, peak_tflops: 0.1}
"""


@dataclasses.dataclass(frozen=True)
class Toy:
    """A recipe file over toy shards, and a folder for runs."""

    recipe: Path
    folder: Path

    def run(self, name: str, *words: str, expect: int = 0, ranks: int = 1) -> str:
        """launch/finetune.py into the run folder `name`, as a user starts it; returns what was printed."""
        command = [ROOT / "launch" / "finetune.py", "--recipe", self.recipe, f"run.dir={self.folder / name}", *words]
        return train(command, ranks, self.folder, expect)

    def clip(self) -> Path:
        """A video as a file of its own: it moves left."""
        path = self.folder / "clip_left.mp4"
        path.write_bytes(video(101, "left"))
        return path

    def records(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a run."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]


def video(number: int, label: str, frames: int = 14) -> bytes:
    """A bright square that moves down, left or right: 64 x 48."""
    rng = np.random.default_rng(number)
    ground, colour = rng.integers(0, 120, 3), rng.integers(160, 255, 3)
    dx, dy = {"down": (0, 2), "left": (-2, 0), "right": (2, 0)}[label]
    pictures = []
    for t in range(frames):
        picture = np.tile(ground.astype(np.uint8), (48, 64, 1))
        x, y = 26 + dx * (t - frames // 2), 18 + dy * (t - frames // 2)
        picture[max(y, 0) : y + 12, max(x, 0) : x + 12] = colour
        pictures.append(picture)
    return encoded(pictures)


def write(path: Path, samples: list[tuple[str, Any, bytes]]) -> None:
    """A shard of (key, label, video)."""
    write_shard(path, [(key, {"key": key, "label": label}, data) for key, label, data in samples])


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("finetune")
    for split, count, first in (("train", 24, 0), ("val", 11, 100)):
        (folder / split).mkdir()
        samples = [(f"{n:04d}", CLASSES[n % 3], video(first + n, CLASSES[n % 3])) for n in range(count)]
        # Keys of the second shard repeat those of the first: only with the shard's name are they unique.
        half = count // 2
        write(folder / split / "s-000000.tar", samples[:half])
        renamed = [(f"{n:04d}", label, data) for n, (_, label, data) in enumerate(samples[half:])]
        write(folder / split / "s-000001.tar", renamed)
    index(folder / "train", folder / "val")
    recipe = folder / "toy.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return Toy(recipe, folder)


@pytest.fixture(scope="session")
def relabelled(toy: Toy) -> Callable[[str, dict[str, Any]], list[str]]:
    """Writes the toy videos with other labels into shards of their own; returns the overrides that name them."""

    def relabel(name: str, labels: dict[str, Any]) -> list[str]:
        words = []
        for split, count, first in (("train", 24, 0), ("val", 11, 100)):
            folder = toy.folder / f"{name}_{split}"
            folder.mkdir()
            kinds = [CLASSES[n % 3] for n in range(count)]
            samples = [(f"{n:04d}", labels[kind], video(first + n, kind)) for n, kind in enumerate(kinds)]
            write(folder / "s-000000.tar", samples)
            words.append(f"data.sources.toy.{'shards' if split == 'train' else 'val'}={folder}")
        index(toy.folder / f"{name}_train", toy.folder / f"{name}_val")
        return words

    return relabel
