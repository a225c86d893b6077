"""Features of labelled videos from a frozen network, computed once and kept in memory or in a file."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from finetune.classification.label_sources import source_rules
from finetune.classification.labels import class_names
from finetune.classification.motion_checks import check_motion
from finetune.classification.validation import centre_view, video_sets
from finetune.classification.views import VideoSet, held_out_videos
from finetune.probe.feature_shards import Row
from finetune.recipe import TuneRecipe
from pretrain.data.held_out import HeldOutSamples, held_out_loader
from pretrain.data.index import load_index
from pretrain.errors import DataError
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)

Kind = Literal["pooled", "tokens"]
#: Most of the free memory that features may take.
MEMORY_SHARE = 0.5


@dataclass
class Features:
    """Features of some videos, ordered by key.

    Attributes:
        keys: source/shard/key.
        values: float32 [n, C] (pooled) or float16 [n, N, C] (tokens).
        targets: class of each, int64 [n].
        names: class names.
    """

    keys: list[str]
    values: Tensor
    targets: Tensor
    names: list[str]

    def save(self, path: Path) -> None:
        """Write an .npz with keys, features, targets, classes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, keys=np.array(self.keys), features=self.values.numpy(), targets=self.targets.numpy(),
                 classes=np.array(self.names))  # fmt: skip

    def take(self, rows: npt.NDArray[np.int64]) -> "Features":
        """Take some of the videos."""
        index = torch.from_numpy(rows)
        return Features([self.keys[i] for i in rows], self.values[index], self.targets[index], self.names)


def training_sets(recipe: TuneRecipe) -> list[VideoSet]:
    """Open the training shards of every source, to be looked at without augmentation."""
    pairs = zip(recipe.data.sources.items(), source_rules(recipe), strict=True)
    sets = [VideoSet(name, load_index(source.shards), source, rules) for (name, source), rules in pairs]
    for one in sets:
        if line := check_motion(one.name, one.index, one.rules.choice, recipe.data.deadline_s):
            logger.info(line)
    return sets


def held_out_sets(recipe: TuneRecipe) -> list[VideoSet]:
    """Open the test or validation shards.

    Raises:
        DataError: no source has any.
    """
    sets = video_sets(recipe, test=True)
    if not sets:
        raise DataError("no held-out videos: give data.sources.<name>.val=FOLDER")
    return sets


def extract(objective: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[VideoSet], kind: Kind) -> Features:
    """Compute features of one centre view of every video, equal on all ranks.

    Raises:
        DataError: they would not fit into memory, or no video can be read.
    """
    # Before the first video is decoded: the kernel's kill would come hours later, without a reason.
    _check_memory(objective, recipe, ranks.device, sum(one.index.samples for one in sets), kind)
    keys: list[str] = []
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for some_keys, found, some_targets in batches(objective, recipe, ranks, sets, kind):
        keys += some_keys
        values.append(found)
        targets += some_targets
    # A rank without readable videos has no tensors to join.
    parts = [part for part in gather_objects(ranks, (keys, values, targets)) if part[0]]
    if not parts:
        raise DataError("none of the videos can be read; see the lines above")
    all_keys = [key for part in parts for key in part[0]]
    # By key: rows are drawn and shuffled by number, and must be the same for any number of ranks.
    order = sorted(range(len(all_keys)), key=all_keys.__getitem__)
    joined = torch.cat([value for part in parts for value in part[1]])[order]
    labels = torch.stack([target for part in parts for target in part[2]])[order]
    return Features([all_keys[i] for i in order], joined, labels, list(class_names(sets[0].rules.labels)))


def batches(
    objective: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[VideoSet], kind: Kind
) -> Iterator[tuple[list[str], Tensor, list[Tensor]]]:
    """Yield keys, features (float32 [b, C] pooled, float16 [b, N, C] of tokens) and targets of this rank's videos."""
    videos = held_out_videos(sets, centre_view(recipe), ranks.rank, ranks.world_size, recipe.data.deadline_s)
    for batch in _batches(videos, recipe):
        video = torch.cat([one["views"] for one in batch]).to(ranks.device)
        found = objective.features({"video": video}, pooled=kind == "pooled").cpu()
        # Tokens are 1,568 vectors a video of 16 x 224 x 224; float16 halves their memory.
        values = found if kind == "pooled" else found.half()
        yield [one["key"] for one in batch], values, [one["target"] for one in batch]


def rows(objective: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[VideoSet], kind: Kind) -> Iterator[Row]:
    """Yield features of this rank's videos one by one, with class and its name where there is one."""
    names = class_names(sets[0].rules.labels)
    for keys, values, targets in batches(objective, recipe, ranks, sets, kind):
        for key, value, target in zip(keys, values, targets, strict=True):
            facts: dict[str, Any] = {"target": target.tolist()}
            if target.ndim == 0:
                facts["class"] = names[int(target)]
            yield Row(key, value.numpy(), facts)


def _batches(videos: HeldOutSamples[dict[str, Any]], recipe: TuneRecipe) -> Iterator[list[dict[str, Any]]]:
    waiting: list[dict[str, Any]] = []
    for one in held_out_loader(videos, recipe.evaluate.workers):
        for lost in one.unreadable:
            logger.warning("%s can't be read: %s", lost.key, lost.reason)
        if one.batch is None:
            continue
        waiting.append(one.batch)
        if len(waiting) == recipe.evaluate.micro:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _check_memory(objective: Any, recipe: TuneRecipe, device: torch.device, videos: int, kind: Kind) -> None:
    # Of a blank clip, not by the model's sizes: every classifier gives features, not all have a token grid.
    blank = torch.zeros(1, *recipe.input.size, 3, dtype=torch.uint8, device=device)
    elements = objective.features({"video": blank}, pooled=kind == "pooled").numel()
    needed = videos * elements * (4 if kind == "pooled" else 2)
    free = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise DataError(
            f"{kind} features of {videos} videos take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "use pooled features (knn, linear), or fewer videos"
        )
