"""Judgement of held-out pictures by COCO's scores: each once, dealt out to ranks, matched where it is looked at."""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.coco.category_names import Category, categories_of
from finetune.coco.instance_drawing import drawn_objects
from finetune.coco.instance_objective import FoundObjects
from finetune.held_out_sets import held_out_sets, report_unreadable
from finetune.recipe import TuneRecipe
from finetune.tested_checkpoint import NO_SHARDS, choose_checkpoint, load_objective, predictions_of
from pretrain.data.held_out import HeldOutSamples, HeldOutSet, RowsWithoutChance, held_out_loader
from pretrain.data.instance_masks import packed_runs, runs_of
from pretrain.data.samples import Batch
from pretrain.engine.transfers import to_device
from pretrain.errors import DataError
from pretrain.metrics.coco_scores import (
    CocoScores,
    PictureMatches,
    TrueObjects,
    best_of_classes,
    box_overlaps,
    coco_scores,
    mask_overlaps,
    match_picture,
)
from pretrain.objectives.base import Method
from pretrain.runtime.pictures import Pixels
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.samples.instance_geometry import unpacked_masks
from pretrain.samples.instances import InstancePictures

logger = logging.getLogger(__name__)

#: Metric whose largest value makes a step the best one.
HEADLINE = "box_AP"
#: Score from which an object is drawn.
DRAWN = 0.5
SHOWN = 5


@dataclass(frozen=True)
class JudgedPicture:
    """One picture: its place in the held-out sets, and how its objects match by boxes and by masks.

    Attributes:
        position: among all pictures, whatever rank it was judged by.
        boxes: matches by boxes.
        masks: matches by masks.
        rows: what was found, as COCO's files of results have it; empty unless asked for.
    """

    position: int
    boxes: PictureMatches
    masks: PictureMatches
    rows: list[dict[str, Any]]


@dataclass
class JudgedInstances:
    """What was judged.

    Attributes:
        pictures: in the order of the sets.
        unreadable: `key: reason` of pictures that are in no score.
        examples: the first ones with what is there and what was found drawn into them, uint8 [H, 2 W, 3].
    """

    pictures: list[JudgedPicture] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    examples: list[Pixels] = field(default_factory=list)


class InstanceValidation:
    """Evaluation for the engine: scores of all sources' validation pictures.

    Args:
        recipe: the run.
        ranks: this process among all; the pictures are dealt out.
        samples: reads pictures and their objects.
    """

    best_by = HEADLINE

    def __init__(self, recipe: TuneRecipe, ranks: Ranks, samples: InstancePictures) -> None:
        self.every_epochs = recipe.evaluate.every_epochs
        self._recipe, self._ranks, self._samples = recipe, ranks, samples
        self._sets = held_out_sets(recipe, test=False)

    def __call__(self, objective: Any) -> dict[str, float]:
        """Compute metrics in percent, equal on all ranks."""
        judged = judge_instances(objective, self._recipe, self._ranks, self._sets, self._samples)
        scores = score_instances(judged, self._recipe.model.classes)
        return instance_metrics(scores, judged)


def judge_instances(
    objective: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[HeldOutSet], samples: InstancePictures,
    categories: Sequence[Category] = (), shown: int = 0,
) -> JudgedInstances:  # fmt: skip
    """Judge the pictures of all sets. All ranks call it, with `objective` in evaluation mode, and get all of it.

    Args:
        objective: the detector.
        recipe: the run.
        ranks: this process among all.
        sets: what to judge.
        samples: reads pictures and their objects.
        categories: the classes; where they are given, the rows of COCO's files of results are kept.
        shown: pictures to draw.

    Raises:
        DataError: more unreadable pictures than data.bad_rate allows, or none that can be read.
    """
    # One at a time: beside larger pictures a small one would be filled up, which attention sees.
    rows = RowsWithoutChance(sets, samples)
    pictures = HeldOutSamples(sets, rows, ranks.rank, ranks.world_size, 1, recipe.data.deadline_s)
    mine = JudgedInstances()
    with objective.evaluated_weights(), torch.no_grad():
        for one in held_out_loader(pictures, recipe.evaluate.workers):
            mine.unreadable += map(str, one.unreadable)
            if one.batch is None:
                continue
            (found,) = objective.detect(to_device(one.batch, ranks.device))
            mine.pictures.append(judged_picture(one.batch, found, categories))
            if ranks.first and len(mine.examples) < shown:
                mine.examples.append(_example(one.batch, found, [category.name for category in categories]))
    parts = gather_objects(ranks, mine)
    pictures_of_all = itertools.chain.from_iterable(part.pictures for part in parts)
    judged = JudgedInstances(
        # By place: equal scores count in this order, which must not depend on how pictures were dealt out.
        sorted(pictures_of_all, key=lambda one: one.position),
        sorted(itertools.chain.from_iterable(part.unreadable for part in parts)),
        parts[0].examples,
    )
    report_unreadable(judged.unreadable, len(judged.pictures), recipe, "pictures")
    return judged


def judged_picture(batch: Batch, found: FoundObjects, categories: Sequence[Category] = ()) -> JudgedPicture:
    """Match what was found in the one picture of a batch with what is there."""
    true = TrueObjects(*(batch[f"truth_{name}"].cpu().numpy() for name in ("labels", "areas", "crowd")))
    width = int(batch["originals"][0, 1])
    masks = unpacked_masks(batch["truth_masks"].cpu().numpy(), width)
    rows, places = best_of_classes(found.labels, found.scores.astype(np.float64))
    labels, scores = found.labels[rows], found.scores[rows].astype(np.float64)
    boxes = found.boxes[rows].astype(np.float64)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    overlaps = box_overlaps(boxes, batch["truth_boxes"].cpu().numpy(), true.crowd)
    by_boxes = match_picture(labels, scores, places, areas, overlaps, true)
    shared = np.zeros_like(overlaps)
    for label in np.unique(labels):
        # Class by class: no others are compared, and all masks of a picture at once are hundreds of megabytes.
        here, there = np.flatnonzero(labels == label), np.flatnonzero(true.labels == label)
        if len(there):
            shares = mask_overlaps(found.masks[rows[here]], masks[there], true.crowd[there])
            shared[np.ix_(here, there)] = shares
    pixels = found.masks[rows].sum((1, 2)).astype(np.float64)
    by_masks = match_picture(labels, scores, places, pixels, shared, true)
    return JudgedPicture(int(batch["position"][0]), by_boxes, by_masks, result_rows(batch, found, categories))


def result_rows(batch: Batch, found: FoundObjects, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Write what was found as COCO's files of results have it; nothing without categories."""
    if not categories:
        return []
    (image,) = batch["images"]
    return [
        {
            "image_id": image,
            "category_id": categories[label].id,
            "bbox": [round(value, 2) for value in (*box[:2], box[2] - box[0], box[3] - box[1])],
            "score": round(score, 5),
            "segmentation": {"size": [*mask.shape], "counts": packed_runs(runs_of(mask))},
        }
        for box, label, score, mask in zip(
            found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), found.masks, strict=True
        )
    ]


def score_instances(judged: JudgedInstances, classes: int) -> dict[str, CocoScores]:
    """Score all pictures, by boxes (`box`) and by masks (`mask`)."""
    return {
        "box": coco_scores([one.boxes for one in judged.pictures], classes),
        "mask": coco_scores([one.masks for one in judged.pictures], classes),
    }


def instance_metrics(scores: dict[str, CocoScores], judged: JudgedInstances) -> dict[str, float]:
    """Give the numbers in percent; those of sizes of objects that there are none of are left out."""
    named = {f"{kind}_{name}": 100 * value for kind, one in scores.items() for name, value in one.named().items()}
    if np.isnan(named[HEADLINE]):
        raise DataError("evaluation: there is no object in any of the held-out pictures, so there is nothing to find")
    return {name: value for name, value in named.items() if not np.isnan(value)} | {
        "pictures": float(len(judged.pictures))
    }


def run_instance_test(method: Method, samples: InstancePictures, ranks: Ranks, which: str) -> dict[str, float]:
    """Test a run's checkpoint on all ranks, and write scores, results and examples.

    Args:
        method: the run.
        samples: reads pictures and their objects.
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
    objective, categories = load_objective(method, ranks, checkpoint), categories_of(recipe)
    judged = judge_instances(objective, recipe, ranks, sets, samples, categories, recipe.evaluate.pictures)
    scores = score_instances(judged, recipe.model.classes)
    if ranks.first:
        write_instance_report(judged, scores, categories, predictions_of(recipe, checkpoint))
    return instance_metrics(scores, judged)


def write_instance_report(
    judged: JudgedInstances, scores: dict[str, CocoScores], categories: Sequence[Category], folder: Path
) -> None:
    """Write scores.json, detections.json as COCO's server takes them, per_class.csv and examples.png."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    result = instance_metrics(scores, judged)
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = [row for one in judged.pictures for row in one.rows]
    (folder / "detections.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    _write_by_class(judged, scores, categories, folder / "per_class.csv")
    logger.info("%s: %d pictures", folder, len(judged.pictures))
    logger.info("  %s", ", ".join(f"{name} {value:.2f}" for name, value in result.items()))
    if judged.examples:
        # Of different sizes: below one another, filled up with white.
        widest = max(one.shape[1] for one in judged.examples)
        padded = [np.pad(one, ((0, 4), (0, widest - one.shape[1]), (0, 0)), constant_values=255)
                  for one in judged.examples]  # fmt: skip
        Image.fromarray(np.concatenate(padded)).save(folder / "examples.png", optimize=True)
        logger.info("  picture: %s", folder / "examples.png")


def _write_by_class(
    judged: JudgedInstances, scores: dict[str, CocoScores], categories: Sequence[Category], path: Path
) -> None:
    """Write a row a class, and a line about the classes that are hardest."""
    counts = np.bincount(
        np.concatenate([one.boxes.true_labels[~one.boxes.uncounted[0]] for one in judged.pictures]),
        minlength=len(categories),
    )
    by_class = {kind: one.by_class() for kind, one in scores.items()}
    lines = ["class,objects,box_AP,mask_AP"]
    for number, category in enumerate(categories):
        shares = [by_class[kind][number] for kind in ("box", "mask")]
        cells = ["" if np.isnan(share) else f"{100 * share:.2f}" for share in shares]
        quoted = category.name.replace('"', '""')
        lines.append(f'"{quoted}",{counts[number]},{",".join(cells)}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = [number for number in np.argsort(by_class["box"]).tolist() if not np.isnan(by_class["box"][number])]
    told = ", ".join(f"{categories[number].name} {100 * by_class['box'][number]:.0f} %" for number in known[:SHOWN])
    logger.info("  hardest classes: %s", told)


def _example(batch: Batch, found: FoundObjects, names: Sequence[str]) -> Pixels:
    """Draw what is there, and beside it what was found, into the one picture of a batch, as large as it is judged."""
    height, width = batch["sizes"][0].tolist()
    picture = batch["video"][0, 0, :height, :width].cpu().numpy()
    original = int(batch["originals"][0, 1])
    labels = batch["truth_labels"].cpu().numpy()
    truth = FoundObjects(
        batch["truth_boxes"].cpu().numpy().astype(np.float32), labels, np.ones(len(labels), np.float32),
        unpacked_masks(batch["truth_masks"].cpu().numpy(), original),
    )  # fmt: skip
    return np.concatenate([drawn_objects(picture, one, names, DRAWN) for one in (truth, found)], axis=1)
