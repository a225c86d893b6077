"""A health signal of pre-training: nearest neighbours among the videos of a small labelled set.

The loss of a masked autoencoder says little about its features, and nothing where they collapse. Here every video's
class is guessed from the other videos of the set (leave one out), by features of one centre clip each.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from pretrain.data.held_out import HeldOut
from pretrain.data.samples import Samples
from pretrain.errors import DataError, RecipeError
from pretrain.metrics.neighbours import leave_one_out_scores
from pretrain.metrics.ranking import accuracy
from pretrain.objectives.base import Method, Objective
from pretrain.runtime.process_group import Ranks, gather_objects


def open_health(method: Method, ranks: Ranks, objective: Objective) -> "HealthSignal | None":
    """Open the signal that the recipe asks for, if any.

    Raises:
        RecipeError: the method gives no features, or its samples no rows to judge.
        DataError: health.shards can't be read.
    """
    recipe = method.recipe
    if recipe.health.shards is None:
        return None
    if lacking := lacking_features(method, objective):
        raise RecipeError(f"health.shards: {lacking}; set health.shards=null")
    return HealthSignal(method, ranks)


def lacking_features(method: Method, objective: Objective) -> str:
    """Say what keeps a method's features from being judged; empty where nothing does."""
    if type(objective).features is Objective.features:
        return f"objective {method.recipe.objective.name} has no `features`"
    if type(method.samples()).without_chance is Samples.without_chance:
        return f"samples of input.name={method.recipe.input.name} have no `without_chance`"
    return ""


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
        self._recipe, self._ranks = recipe, ranks
        self._videos = HeldOut(
            "health", recipe.health.shards, method.samples(), ranks, recipe.batch.micro, recipe.data.deadline_s
        )

    def __call__(self, objective: Any) -> dict[str, float]:
        """Measure top-1 accuracy in percent, that of always saying the largest class, and videos; equal on all ranks.

        All ranks call it; `objective` is in evaluation mode.

        Raises:
            DataError: less than two videos can be read.
        """
        numbers: list[int] = []
        labels: list[str] = []
        features: list[Tensor] = []
        for batch in self._videos.batches():
            features.append(objective.features(batch.rows).cpu())
            numbers += batch.numbers
            labels += batch.labels
        # With sharded weights every rank takes part in every forward pass, also one that has fewer videos.
        if self._recipe.zero.stage == 3:
            for _ in range(self._videos.most_batches - len(features)):
                objective.features(self._videos.blank())
        return self._score(gather_objects(self._ranks, (numbers, labels, features)))

    def _score(self, parts: list[tuple[list[int], list[str], list[Tensor]]]) -> dict[str, float]:
        numbers = [number for part in parts for number in part[0]]
        labels = [label for part in parts for label in part[1]]
        if len(labels) < 2:
            raise DataError(f"health.shards={self._videos.url}: {len(labels)} of its videos can be read; see above")
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
