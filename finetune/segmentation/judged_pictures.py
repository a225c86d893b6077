"""Judgement of held-out pictures: each once, dealt out to ranks, scored by one matrix of all pixels."""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.held_out_sets import held_out_sets, report_unreadable
from finetune.recipe import TuneRecipe
from finetune.segmentation.mask_classes import class_names_of, painted
from finetune.tested_checkpoint import NO_SHARDS, choose_checkpoint, load_objective, predictions_of
from pretrain.data.held_out import HeldOutSamples, HeldOutSet, RowsWithoutChance, held_out_loader
from pretrain.engine.transfers import to_device
from pretrain.errors import DataError
from pretrain.metrics.segmentation import SegmentationScores, segmentation_confusion, segmentation_scores
from pretrain.objectives.base import Method
from pretrain.runtime.pictures import Pixels, contact_sheet
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.samples.picture_mask import MaskedPictures, resize_labels

logger = logging.getLogger(__name__)

#: Metric whose largest value makes a step the best one.
HEADLINE = "mIoU"
SHOWN = 5


@dataclass
class JudgedPictures:
    """Pixels counted by class, and what of it is to be shown.

    Attributes:
        confusion: int64 [K, K + 1], see `pretrain.metrics.segmentation`.
        pictures: that were judged.
        unreadable: `key: reason` of pictures that are in no score.
        examples: picture [H, W, 3], labels and answer [H, W] of the first ones.
    """

    confusion: Tensor
    pictures: int = 0
    unreadable: list[str] = field(default_factory=list)
    examples: list[tuple[Pixels, Any, Any]] = field(default_factory=list)


class SegmentationValidation:
    """Evaluation for the engine: scores of all sources' validation pictures.

    Args:
        recipe: the run.
        ranks: this process among all; the pictures are dealt out.
        samples: reads pictures and masks.
    """

    best_by = HEADLINE

    def __init__(self, recipe: TuneRecipe, ranks: Ranks, samples: MaskedPictures) -> None:
        self.every_epochs = recipe.evaluate.every_epochs
        self._recipe, self._ranks, self._samples = recipe, ranks, samples
        self._sets = held_out_sets(recipe, test=False)

    def __call__(self, objective: Any) -> dict[str, float]:
        """Compute metrics in percent, equal on all ranks."""
        return metrics(judge_pictures(objective, self._recipe, self._ranks, self._sets, self._samples))


def judge_pictures(
    objective: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[HeldOutSet], samples: MaskedPictures, shown: int = 0
) -> JudgedPictures:
    """Judge the pictures of all sets. All ranks call it, with `objective` in evaluation mode, and get all of it.

    Raises:
        DataError: more unreadable pictures than data.bad_rate allows, or none that can be read.
    """
    classes, evaluate = recipe.model.classes, recipe.evaluate
    # One at a time: pictures differ in size, and what fills smaller ones up would be seen by attention.
    rows = RowsWithoutChance(sets, samples)
    pictures = HeldOutSamples(sets, rows, ranks.rank, ranks.world_size, 1, recipe.data.deadline_s)
    mine = JudgedPictures(torch.zeros(classes, classes + 1, dtype=torch.int64))
    # With sharded weights every rank takes part in every pass, also one that has fewer pictures or smaller ones.
    together = recipe.zero.stage == 3
    rounds = pictures.batches(evaluate.workers) if together else 0
    with objective.evaluated_weights(), torch.no_grad():
        for one, _ in itertools.zip_longest(held_out_loader(pictures, evaluate.workers), range(rounds)):
            found = None if one is None else one.batch
            if one is not None:
                mine.unreadable += map(str, one.unreadable)
            if together:
                own = 0 if found is None else objective.passes(*found["video"].shape[2:4])
                objective.idle(max(gather_objects(ranks, own)) - own)
            if found is None:
                continue
            batch = to_device(found, ranks.device)
            labels = batch["mask"]
            answer = objective.segment(batch["video"], *labels.shape[1:])
            mine.confusion += segmentation_confusion(labels, answer, classes).cpu()
            mine.pictures += 1
            if ranks.first and len(mine.examples) < shown:
                mine.examples.append((batch["video"][0, 0].cpu().numpy(), labels[0].cpu().numpy(),
                                      answer[0].cpu().numpy()))  # fmt: skip
    parts = gather_objects(ranks, mine)
    judged = JudgedPictures(
        torch.stack([part.confusion for part in parts]).sum(0),
        sum(part.pictures for part in parts),
        sorted(itertools.chain.from_iterable(part.unreadable for part in parts)),
        parts[0].examples,
    )
    report_unreadable(judged.unreadable, judged.pictures, recipe, "pictures")
    return judged


def metrics(judged: JudgedPictures) -> dict[str, float]:
    """Give the scores in percent."""
    scores = segmentation_scores(judged.confusion)
    return {
        HEADLINE: 100 * scores.mean_iou,
        "mean_accuracy": 100 * scores.mean_accuracy,
        "pixel_accuracy": 100 * scores.pixel_accuracy,
        "pictures": float(judged.pictures),
    }


def run_segmentation_test(method: Method, samples: MaskedPictures, ranks: Ranks, which: str) -> dict[str, float]:
    """Test a run's checkpoint on all ranks.

    Args:
        method: the run.
        samples: reads pictures and masks.
        ranks: this process among all.
        which: "last", "best", or the folder of a checkpoint.

    Raises:
        DataError: the recipe names no test shards.
        CheckpointError: no such checkpoint, or it does not verify.
    """
    recipe = method.recipe
    sets = held_out_sets(recipe, test=True)
    if not sets:
        raise DataError(NO_SHARDS)
    checkpoint = choose_checkpoint(recipe, ranks, which)
    objective = load_objective(method, ranks, checkpoint)
    judged = judge_pictures(objective, recipe, ranks, sets, samples, recipe.evaluate.pictures)
    folder = predictions_of(recipe, checkpoint)
    if ranks.first:
        write_report(judged, class_names_of(recipe), folder)
    return metrics(judged)


def write_report(judged: JudgedPictures, names: Sequence[str], folder: Path) -> None:
    """Write scores.json, per_class.csv and examples.png."""
    folder.mkdir(parents=True, exist_ok=True)
    result = metrics(judged)
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    scores = segmentation_scores(judged.confusion)
    write_classes(scores, judged.confusion, names, folder / "per_class.csv")
    logger.info("%s: %d pictures", folder, judged.pictures)
    logger.info("  %s", ", ".join(f"{name} {value:.2f}" for name, value in result.items()))
    if judged.examples:
        save_examples(judged, len(names), folder / "examples.png")
        logger.info("  picture: %s", folder / "examples.png")


def write_classes(scores: SegmentationScores, confusion: Tensor, names: Sequence[str], path: Path) -> None:
    """Write a row a class, and a line about the classes that are hardest."""
    lines = ["class,pixels,iou,accuracy"]
    for number, name in enumerate(names):
        quoted = name.replace('"', '""')
        shares = (float(values[number]) for values in (scores.iou, scores.accuracy))
        cells = ["" if np.isnan(share) else f"{100 * share:.2f}" for share in shares]
        lines.append(f'"{quoted}",{int(confusion[number].sum())},{",".join(cells)}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = [number for number in scores.iou.argsort().tolist() if not scores.iou[number].isnan()]
    hardest = ", ".join(f"{names[number]} {100 * float(scores.iou[number]):.0f} %" for number in known[:SHOWN])
    logger.info("  hardest classes: %s", hardest)


def save_examples(judged: JudgedPictures, classes: int, path: Path) -> None:
    """Draw pictures with their labels and answers laid over them."""
    from PIL import Image

    sheets = []
    for picture, labels, found in judged.examples:
        height, width = picture.shape[:2]
        over = {name: painted(picture, resize_labels(one, width, height), classes)
                for name, one in (("labels", labels), ("predicted", found))}  # fmt: skip
        rows = {"picture": picture, **over}
        sheets.append(contact_sheet({name: one[None, None] for name, one in rows.items()}))
    # Of different sizes: beside one another, filled up with white.
    tallest = max(len(sheet) for sheet in sheets)
    padded = [np.pad(sheet, ((0, tallest - len(sheet)), (0, 0), (0, 0)), constant_values=255) for sheet in sheets]
    Image.fromarray(np.concatenate(padded, axis=1)).save(path, optimize=True)
