"""Test of a trained detector: every held-out keyframe once, frame-mAP in AVA's variants, detections.csv."""

import csv
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from finetune.detection.actions import action_list
from finetune.detection.answers import Detections
from finetune.detection.judging import HEADLINE, Judgement, judge, score
from finetune.held_out_sets import held_out_sets
from finetune.tested_checkpoint import NO_SHARDS, choose_checkpoint, load_objective, predictions_of
from pretrain.data.boxes.action_list import ActionList
from pretrain.errors import DataError
from pretrain.metrics.detection import FrameMap
from pretrain.objectives.base import Method
from pretrain.runtime.process_group import Ranks, from_first
from pretrain.samples.box_facts import time_text
from pretrain.samples.boxes import BoxSamples

logger = logging.getLogger(__name__)

#: AVA's variants of frame-mAP; their numbers are not comparable.
VARIANTS = ("activitynet", "slowfast", "alphaction")
#: Lower scores are left out of the csv: most of 80 actions of each box have one.
LEAST_SCORE = 5e-6
SHOWN_CLASSES = 5


def run_detection_test(method: Method, samples: BoxSamples, ranks: Ranks, which: str) -> dict[str, float]:
    """Test a run's checkpoint on all ranks.

    Args:
        method: the run.
        samples: makes the clips.
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
    actions = action_list(recipe)
    judged = judge(load_objective(method, ranks, checkpoint), recipe, ranks, sets, samples)
    folder = predictions_of(recipe, checkpoint)
    return from_first(ranks, _report(judged, actions, recipe.objective.metric, folder) if ranks.first else {})


def _report(judged: Judgement, actions: ActionList, metric: str, folder: Path) -> dict[str, float]:
    """Write scores, classes and detections, on rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {variant: score(judged, actions, variant) for variant in dict.fromkeys((metric, *VARIANTS))}
    result = {HEADLINE: 100 * found[metric].mean, "keyframes": float(len(judged.truth))}
    result |= {f"{HEADLINE} ({variant})": 100 * one.mean for variant, one in found.items()}
    (folder / "scores.json").write_text(json.dumps(result | {"metric": metric}, indent=1) + "\n", encoding="utf-8")
    write_detections(judged.answers, actions, folder / "detections.csv")
    write_class_precision(found[metric], actions, folder / "per_class.csv")
    logger.info("%s: %d keyframes, %d boxes", folder, len(judged.truth), sum(len(one.boxes) for one in judged.answers))
    for variant, one in found.items():
        logger.info("  frame-mAP@0.5 (%s) %.2f", variant, 100 * one.mean)
    return result


def write_detections(answers: Iterable[Detections], actions: ActionList, path: Path) -> None:
    """Write `video,second,x1,y1,x2,y2,action_id,score`, a row a box and action, as AVA's evaluation reads it.

    Boxes have five decimals. Scores have all digits of float32: rounded ones are equal more often, and the order of
    equal scores moves a number. Below `LEAST_SCORE` there is no row.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        for one in answers:
            for box, scores in zip(one.boxes, one.scores, strict=True):
                corners = [f"{value:.5f}" for value in box]
                for output in np.flatnonzero(scores >= LEAST_SCORE):
                    identity = output + actions.first
                    rows.writerow([one.video, time_text(one.time), *corners, identity, f"{scores[output]:.9g}"])


def write_class_precision(found: FrameMap, actions: ActionList, path: Path) -> None:
    """Write per_class.csv, and a line about the classes that are hardest."""
    known = {output: value for output, value in found.by_class.items() if value is not None}
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["id", "class", "persons", "average_precision"])
        for output, count in found.truths.items():
            precision = f"{100 * known[output]:.2f}" if output in known else ""
            rows.writerow([output + actions.first, actions.name(output), count, precision])
    hardest = sorted(known, key=lambda output: known[output])[:SHOWN_CLASSES]
    logger.info("  hardest classes: %s", ", ".join(f"{actions.name(one)} {100 * known[one]:.0f} %" for one in hardest))
