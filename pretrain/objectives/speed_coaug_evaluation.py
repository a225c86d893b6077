"""Retrieval by encoders of video and sound: each by the other, and videos by videos of their class.

Source: systems/speed_coaug.md, section 7. Samples are judged at speed 1, as they are cut without chance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.data.held_out import HeldOut
from pretrain.errors import DataError
from pretrain.metrics.retrieval import class_retrieval, retrieval_scores
from pretrain.objectives.contrast import normalized
from pretrain.objectives.speed_coaug_loss import HEARD, SEEN
from pretrain.recipe.schema import Recipe
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.samples.audio_video import AudioVideo

#: Ranks of which the share of queries is told: pairs, classes.
PAIRS_AT, CLASSES_AT = (1, 5, 10), (1, 5, 20)


@dataclass
class HeldOutSounds:
    """Held-out videos that retrieval is measured on."""

    pairs: str | None = None
    """folder (any fsspec URL) of videos with sound, in which each is found by the other; null: no such measure"""
    queries: str | None = None
    """folder of labelled videos, sound not needed, that look for others of their class; null: no such measure"""
    gallery: str | None = None
    """folder of labelled videos in which queries look (officially the training set); null: the other queries"""
    clips: int = 10
    """clips of a video whose vectors are averaged where classes are looked for"""
    every_epochs: float = 1
    """epochs between two measures while training; fractions are allowed, 0: none"""
    micro: int = 16
    """videos in one forward pass of one rank"""

    @property
    def any(self) -> bool:
        """Whether anything is measured."""
        return self.pairs is not None or self.queries is not None

    def problems(self, key: str) -> list[str]:
        """Say what can't work; `key` is the name of this section."""
        found = []
        if min(self.clips, self.micro) < 1 or self.every_epochs < 0:
            found.append(f"{key}: found clips={self.clips}, micro={self.micro}, every_epochs={self.every_epochs:g}; "
                         "allowed: 1 or more, and epochs from 0")  # fmt: skip
        if self.gallery is not None and self.queries is None:
            found.append(f"{key}.gallery={self.gallery}: nobody looks there; set {key}.queries")
        return found


class RetrievalRows(NamedTuple):
    """Videos of a batch: numbers in their set, unit vectors of what is seen and of what is heard, labels."""

    numbers: list[int]
    seen: Tensor
    heard: Tensor
    labels: list[str]


class SpeedCoaugEvaluation:
    """Retrieval on held-out videos.

    Args:
        recipe: the run.
        options: what is measured.
        ranks: this process among all; the videos are dealt out.

    Raises:
        DataError: the shards can't be read.
    """

    def __init__(self, recipe: Recipe, options: HeldOutSounds, ranks: Ranks) -> None:
        self.every_epochs: float = options.every_epochs
        self.best_by = "class_R@1" if options.pairs is None else "video_to_sound_R@1"
        self._recipe, self._options, self._ranks = recipe, options, ranks
        self._pairs = None if options.pairs is None else self._opened("pairs", options.pairs, 1)
        self._classes = {
            name: self._opened(name, url, options.clips)
            for name, url in (("queries", options.queries), ("gallery", options.gallery))
            if url is not None
        }

    def _opened(self, name: str, url: str, clips: int) -> HeldOut:
        silent = name != "pairs"
        samples = AudioVideo(self._recipe.input, self._recipe.run.seed, clips, silent)
        deadline = self._recipe.data.deadline_s
        micro = max(self._options.micro // clips, 1)
        return HeldOut(f"held_out.{name}", url, samples, self._ranks, micro, deadline, labelled=silent)

    def __call__(self, objective: Any) -> dict[str, float]:
        """Measure. All ranks call it; `objective` is in evaluation mode.

        Raises:
            DataError: no video can be used.
        """
        found: dict[str, float] = {}
        if self._pairs is not None:
            seen, heard, _ = self._judged(self._pairs, objective, _both)
            found |= pair_scores(seen, heard)
        if self._classes:
            queries, _, labels = self._judged(self._classes["queries"], objective, self._video)
            gallery, others = queries, labels
            if "gallery" in self._classes:
                gallery, _, others = self._judged(self._classes["gallery"], objective, self._video)
            found |= class_scores(queries, labels, gallery, others)
        return found

    @torch.no_grad()
    def _judged(
        self, videos: HeldOut, objective: Any, look: Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Compute unit vectors of all videos of all ranks in their order, and their labels."""
        judged = [
            RetrievalRows(batch.numbers, seen.cpu(), heard.cpu(), batch.labels)
            for batch in videos.batches()
            for seen, heard in [look(objective, batch.rows)]
        ]
        # With sharded weights every rank takes part in every forward pass, also one that has fewer videos.
        if self._recipe.zero.stage == 3:
            for _ in range(videos.most_batches - len(judged)):
                look(objective, videos.blank())
        parts = [one for part in gather_objects(self._ranks, judged) for one in part]
        if not parts:
            raise DataError(f"objective.held_out: no video of {videos.url} can be used; see the warnings above")
        order = torch.tensor([number for part in parts for number in part.numbers]).argsort()
        labels = [label for part in parts for label in part.labels]
        seen, heard = torch.cat([part.seen for part in parts])[order], torch.cat([part.heard for part in parts])[order]
        return seen, heard, [labels[place] for place in order.tolist()]

    def _video(self, objective: Any, rows: dict[str, Any]) -> tuple[Tensor, Tensor]:
        found = objective.features(rows)
        # A made-up row stands alone.
        vectors = normalized(found.unflatten(0, (-1, min(self._options.clips, len(found)))).mean(1))
        return vectors, vectors[:, :0]


def _both(objective: Any, rows: dict[str, Any]) -> tuple[Tensor, Tensor]:
    found = objective.embed(_numbered(rows))
    return found[SEEN], found[HEARD]


def _numbered(rows: dict[str, Any]) -> dict[str, Any]:
    """Add the numbers that a loss would ask for, and a judgement does not."""
    count, device = len(rows["video"]), rows["video"].device
    return rows | {"file": torch.arange(count, device=device), "speed": torch.ones(count, 2, device=device)}


def pair_scores(seen: Tensor, heard: Tensor) -> dict[str, float]:
    """Score retrieval of each by the other; unit vectors [N, D], pairs in the same row."""
    similarity, truth = seen @ heard.t(), torch.arange(len(seen))
    found = {"pairs": float(len(seen))}
    # Ties count as their mean: encoders that answer the same to everything would else find all.
    for name, one in (("video_to_sound", similarity), ("sound_to_video", similarity.t())):
        found |= retrieval_scores(one, truth, "mean", PAIRS_AT).named(name)
    return found


def class_scores(queries: Tensor, labels: list[str], gallery: Tensor, others: list[str]) -> dict[str, float]:
    """Score whether any of a query's nearest videos is of its class; unit vectors [Q, C] and [N, C].

    Where queries and gallery are the same tensor, a query does not find itself.
    """
    names = {name: number for number, name in enumerate(sorted({*labels, *others}))}
    similarity = queries @ gallery.t()
    if queries is gallery:
        similarity = similarity.masked_fill(torch.eye(len(queries), dtype=torch.bool), -torch.inf)
    own, theirs = (torch.tensor([names[label] for label in side]) for side in (labels, others))
    scores = class_retrieval(similarity, own, theirs, CLASSES_AT, "mean")
    return {"queries": float(len(queries))} | {f"class_R@{k}": value for k, value in scores.recall.items()}
