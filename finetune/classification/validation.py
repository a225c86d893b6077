"""Evaluation of a model on a set of videos: one centre view each while training, clips x crops in the test."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.classification.label_sources import source_rules
from finetune.classification.labels import class_names, held_out_misfits
from finetune.classification.motion_checks import check_motion
from finetune.classification.predictions import Predictions, checked, scores
from finetune.classification.views import EvaluationViews, SourceRules, VideoSet, held_out_videos
from finetune.held_out_sets import held_out_sets, report_missing
from finetune.recipe import TuneRecipe
from pretrain.data.held_out import Unreadable, held_out_loader
from pretrain.errors import DataError
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)

#: Metric whose largest value makes a step the best one, by task.
HEADLINE = {"single": "top1", "multi": "mAP", "regression": "r2"}


class Validation:
    """Evaluation for the engine: metrics of all sources' validation videos, one centre view each.

    Args:
        recipe: the run.
        ranks: this process among all; the videos are dealt out.
    """

    def __init__(self, recipe: TuneRecipe, ranks: Ranks) -> None:
        self.every_epochs, self.best_by = recipe.evaluate.every_epochs, HEADLINE[recipe.objective.task]
        self._recipe, self._ranks = recipe, ranks
        self._sets = labelled(video_sets(recipe, test=False))

    def __call__(self, objective: Any) -> dict[str, float]:
        """Compute metrics, equal on all ranks."""
        mine = predict(objective, self._recipe, self._ranks, self._sets, centre_view(self._recipe))
        return scores(checked(join(gather_objects(self._ranks, mine))))


def video_sets(recipe: TuneRecipe, test: bool, rules: list[SourceRules] | None = None) -> list[VideoSet]:
    """Open the validation or test shards of the sources that have some.

    Args:
        recipe: the run.
        test: those of the test, else of validation.
        rules: of the sources, where they are known; else read.

    Raises:
        DataError: shards are not there, or motion curves that their rules need.
    """
    known = source_rules(recipe) if rules is None else rules
    rule_of = dict(zip(recipe.data.sources, known, strict=True))
    sets = [VideoSet(one.name, one.index, one.options, rule_of[one.name]) for one in held_out_sets(recipe, test)]
    for one in sets:
        if line := check_motion(one.name, one.index, one.rules.choice, recipe.data.deadline_s):
            logger.info(line)
    return sets


def labelled(sets: list[VideoSet]) -> list[VideoSet]:
    """Return held-out videos that are to be scored, after comparing their labels with the classes that are trained.

    Raises:
        DataError: labels that are no class.
    """
    # Else their videos were bad samples: left out of every score if few, the end of a run that has trained if many.
    if problems := [line for one in sets for line in held_out_misfits(one.index.url, one.rules.labels)]:
        raise DataError("\n".join(problems))
    return sets


def centre_view(recipe: TuneRecipe) -> EvaluationViews:
    """Give the one view of validation."""
    return EvaluationViews(recipe.input.size, recipe.input.decoder)


def test_views(recipe: TuneRecipe) -> EvaluationViews:
    """Give the clips x crops of the test."""
    evaluate, size = recipe.evaluate, recipe.input.size
    if evaluate.crop_size is not None:
        size = (size[0], evaluate.crop_size, evaluate.crop_size)
    return EvaluationViews(size, recipe.input.decoder, evaluate.clips, evaluate.crops, validation=False)


def predict(
    objective: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[VideoSet], views: EvaluationViews
) -> Predictions:
    """Predict this rank's part of the videos. All ranks call it; `objective` is in evaluation mode.

    Raises:
        DataError: more unreadable videos than data.bad_rate allows.
    """
    videos = held_out_videos(sets, views, ranks.rank, ranks.world_size, recipe.data.deadline_s)
    keys: list[str] = []
    targets: list[np.ndarray] = []
    logits: list[Tensor] = []
    unreadable: list[Unreadable] = []

    def readable() -> Iterator[Tensor]:
        for one in held_out_loader(videos, recipe.evaluate.workers):
            unreadable.extend(one.unreadable)
            if (video := one.batch) is None:
                continue
            keys.append(video["key"])
            targets.append(video["target"].numpy())
            # Views and not videos fill a batch: 15 views of one video may be more than a device holds.
            yield from video["views"]

    # With sharded weights every rank takes part in every forward pass, also one that has fewer videos.
    most = videos.batches(0) * views.count
    passes = -(-most // recipe.evaluate.micro) if recipe.zero.stage == 3 else 0
    with objective.evaluated_weights():
        for batch in _batches(readable(), recipe.evaluate.micro):
            logits.append(objective.predict(batch.to(ranks.device, non_blocking=True)).cpu())
        for _ in range(passes - len(logits)):
            objective.predict(torch.zeros(1, *views.size, 3, dtype=torch.uint8,
                                          device=ranks.device))  # fmt: skip
    report_missing(unreadable, len(keys), recipe, "videos")
    classes = recipe.model.classes
    per_view = torch.cat(logits).numpy() if logits else np.zeros((0, classes), np.float32)
    return Predictions(
        recipe.objective.task,
        # Of the first: `source_rules` has refused sources that name their classes differently.
        list(class_names(sets[0].rules.labels)),
        keys,
        np.stack(targets) if targets else np.zeros((0,), np.int64),
        per_view.reshape(len(keys), views.count, classes),
        list(map(str, unreadable)),
        recipe.evaluate.average,
    )


def join(parts: list[Predictions]) -> Predictions:
    """Join the predictions of all ranks.

    Raises:
        DataError: there are none.
    """
    filled = [part for part in parts if part.keys]
    if not filled:
        raise DataError("evaluation: none of the videos could be read; see the lines above")
    return Predictions(
        filled[0].task,
        filled[0].names,
        [key for part in filled for key in part.keys],
        np.concatenate([part.targets for part in filled]),
        np.concatenate([part.logits for part in filled]),
        [line for part in parts for line in part.unreadable],
        filled[0].average,
    )


def _batches(views: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    waiting: list[Tensor] = []
    for view in views:
        waiting.append(view)
        if len(waiting) == size:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)
