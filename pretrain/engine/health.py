"""A health signal of pre-training: nearest neighbours among the videos of a small labelled set.

The loss of a masked autoencoder says little about its features, and nothing where they collapse. Here every video's
class is guessed from the other videos of the set (leave one out), by features of one centre clip each.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data.decoders import open_video
from pretrain.data.fetch import SampleReader, read_ahead
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from pretrain.errors import DataError, RecipeError, SampleError
from pretrain.metrics.neighbours import accuracy, leave_one_out_scores
from pretrain.objectives.base import Objective
from pretrain.recipe.schema import Recipe
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.samples import sampling, transforms

logger = logging.getLogger(__name__)

#: Videos decoded at a time, ahead of the network.
DECODERS = 4

#: Number of the video in the set, label, clip uint8 [T, H, W, 3].
Labelled = tuple[int, str, np.ndarray]


def open_health(recipe: Recipe, ranks: Ranks, objective: Objective) -> "HealthSignal | None":
    """The signal that the recipe asks for, if any.

    Raises:
        RecipeError: the method gives no features.
        DataError: health.shards can't be read.
    """
    if recipe.health.shards is None:
        return None
    if type(objective).features is Objective.features:
        raise RecipeError(f"health.shards: objective {recipe.objective.name} has no `features`; set health.shards=null")
    return HealthSignal(recipe, ranks)


class HealthSignal:
    """Measures; ranks share the videos.

    Args:
        recipe: the run, with health.shards.
        ranks: this process among all.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        assert recipe.health.shards is not None
        self.every_epochs = recipe.health.every_epochs
        self._recipe, self._ranks = recipe, ranks
        self._index = load_index(recipe.health.shards)
        self._reader = SampleReader([self._index], None, recipe.data.deadline_s)

    def __call__(self, objective: Any) -> dict[str, float]:
        """Top-1 accuracy in percent, that of always saying the largest class, and the videos; equal on all ranks.

        All ranks call it; `objective` is in evaluation mode.

        Raises:
            DataError: less than two videos can be read.
        """
        numbers: list[int] = []
        labels: list[str] = []
        features: list[Tensor] = []
        for batch in self._batches():
            clips = torch.from_numpy(np.stack([clip for _, _, clip in batch])).to(self._ranks.device)
            features.append(objective.features(clips).cpu())
            numbers += [number for number, _, _ in batch]
            labels += [label for _, label, _ in batch]
        self._keep_up(objective, len(features))
        return self._score(gather_objects(self._ranks, (numbers, labels, features)))

    def _score(self, parts: list[tuple[list[int], list[str], list[Tensor]]]) -> dict[str, float]:
        numbers = [number for part in parts for number in part[0]]
        labels = [label for part in parts for label in part[1]]
        if len(labels) < 2:
            raise DataError(f"health.shards={self._index.url}: {len(labels)} of its videos can be read; see above")
        order = sorted(range(len(numbers)), key=numbers.__getitem__)  # as one rank has them
        values = torch.cat([one for part in parts for one in part[2]])[order]
        names = sorted(set(labels))
        targets = torch.tensor([names.index(labels[i]) for i in order])
        votes = leave_one_out_scores(values, targets, len(names), self._recipe.health.neighbours)
        largest = Counter(labels).most_common(1)[0][1]
        return {
            "knn_top1": accuracy(votes, targets),
            "largest_class": 100 * largest / len(labels),
            "videos": float(len(labels)),
        }

    def _keep_up(self, objective: Any, done: int) -> None:
        """With sharded weights every rank takes part in every forward pass, also one that has fewer videos."""
        if self._recipe.zero.stage < 3:
            return
        data, videos = self._recipe.data, -(-self._index.samples // self._ranks.world_size)
        blank = torch.zeros(1, data.frames, data.height, data.width, 3, dtype=torch.uint8, device=self._ranks.device)
        for _ in range(-(-videos // self._recipe.batch.micro) - done):
            objective.features(blank)

    def _batches(self) -> Iterator[list[Labelled]]:
        waiting: list[Labelled] = []
        # Decoded by threads of this process: a data worker's start would take longer than a small set.
        for place, video in read_ahead(self._places(), self._read, DECODERS):
            try:
                waiting.append(video.result())
            except SampleError as error:
                logger.warning("health: %s can't be used: %s", self._reader.key(0, *place[1:]), error)
                continue
            if len(waiting) == self._recipe.batch.micro:
                yield waiting
                waiting = []
        if waiting:
            yield waiting

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Number, shard and row of this rank's videos."""
        rows = [(shard, row) for shard, count in enumerate(self._index.shards.samples.tolist()) for row in range(count)]
        for number in range(self._ranks.rank, len(rows), self._ranks.world_size):
            yield (number, *rows[number])

    def _read(self, place: tuple[int, int, int]) -> Labelled:
        data, (number, shard, row) = self._recipe.data, place
        members = parse_sample(self._reader.read(0, shard, row))
        label = members.label
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise SampleError("label", f"{label!r} is no class name or number")
        with open_video(members.video(), data.decoder, members.stamps) as reader:
            start = (sampling.clip_starts(reader.num_frames, data.frames, data.stride) - 1) // 2
            clip = reader.frames(sampling.clip_frames(reader.num_frames, data.frames, data.stride, start))
        return number, str(label), transforms.centre_crop(clip, data.width, data.height)
