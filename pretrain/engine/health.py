"""A health signal of pre-training: nearest neighbours among the videos of a small labelled set.

The loss of a masked autoencoder says little about its features, and nothing where they collapse. Here every video's
class is guessed from the other videos of the set (leave one out), by features of one centre clip each.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pretrain.data.fetch import SampleReader, read_ahead
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from pretrain.data.samples import Arrays, Samples, SourceInfo, joined
from pretrain.errors import DataError, RecipeError, SampleError
from pretrain.metrics.neighbours import leave_one_out_scores
from pretrain.metrics.ranking import accuracy
from pretrain.objectives.base import Method, Objective
from pretrain.recipe.schema import Source
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)

#: Videos decoded at a time, ahead of the network.
DECODERS = 4

#: Number of the sample in the set, label, arrays [1, ...].
Labelled = tuple[int, str, Arrays]


def open_health(method: Method, ranks: Ranks, objective: Objective) -> "HealthSignal | None":
    """Open the signal that the recipe asks for, if any.

    Raises:
        RecipeError: the method gives no features, or its samples no rows to judge.
        DataError: health.shards can't be read.
    """
    recipe = method.recipe
    if recipe.health.shards is None:
        return None
    if type(objective).features is Objective.features:
        raise RecipeError(f"health.shards: objective {recipe.objective.name} has no `features`; set health.shards=null")
    if type(method.samples()).without_chance is Samples.without_chance:
        raise RecipeError(
            f"health.shards: samples of input.name={recipe.input.name} have no `without_chance`; set health.shards=null"
        )
    return HealthSignal(method, ranks)


class HealthSignal:
    """Measure of features by nearest neighbours; ranks share the videos.

    Args:
        method: the run, with health.shards.
        ranks: this process among all.
    """

    def __init__(self, method: Method, ranks: Ranks) -> None:
        recipe = method.recipe
        assert recipe.health.shards is not None
        self.every_epochs = recipe.health.every_epochs
        self._recipe, self._ranks, self._samples = recipe, ranks, method.samples()
        self._index = load_index(recipe.health.shards)
        self._source = SourceInfo("health", self._index.shards, Source(shards=recipe.health.shards))
        self._blank = method.example(1)
        self._reader = SampleReader([self._index], None, recipe.data.deadline_s)

    def __call__(self, objective: Any) -> dict[str, float]:
        """Measure top-1 accuracy in percent, that of always saying the largest class, and videos; equal on all ranks.

        All ranks call it; `objective` is in evaluation mode.

        Raises:
            DataError: less than two videos can be read.
        """
        numbers: list[int] = []
        labels: list[str] = []
        features: list[Tensor] = []
        for batch in self._batches():
            rows = joined([arrays for _, _, arrays in batch])
            on_device = {name: value.to(self._ranks.device) for name, value in rows.items()}
            features.append(objective.features(on_device).cpu())
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
        """Take part in the other ranks' forward passes, as sharded weights ask of a rank that has fewer videos."""
        if self._recipe.zero.stage < 3:
            return
        # The most that any rank has: videos that can't be used make batches fewer on one rank and not on the others.
        videos = -(-self._index.samples // self._ranks.world_size)
        blank = {name: value[:1].to(self._ranks.device) for name, value in self._blank.items()
                 if isinstance(value, Tensor)}  # fmt: skip
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
        """Yield number, shard and row of this rank's videos."""
        rows = [(shard, row) for shard, count in enumerate(self._index.shards.samples.tolist()) for row in range(count)]
        for number in range(self._ranks.rank, len(rows), self._ranks.world_size):
            yield (number, *rows[number])

    def _read(self, place: tuple[int, int, int]) -> Labelled:
        number, shard, row = place
        members = parse_sample(self._reader.read(0, shard, row))
        label = members.label
        # To Python a bool is an int, but no class is called True.
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise SampleError("label", f"{label!r} is no class name or number")
        return number, str(label), self._samples.without_chance(self._source, members)
