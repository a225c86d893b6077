"""`evaluate.py --from-csv … --tubes`: frame-mAP and video-mAP of UCF101-24 and JHMDB, beside the truth.

Detections are a csv `video, frame, x1, y1, x2, y2, class id, score`: pixels, frames and class ids from 1. Each class is
linked by itself from boxes on frames. Source: systems/action_detection.md section 5.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from finetune.detection.tube_truth import TruthOptions, count_folds, read_tube_truth, rows_by, true_tubes
from pretrain.data.boxes.action_list import ActionList
from pretrain.data.boxes.records import BoxRecords
from pretrain.data.boxes.yowo_files import read_yowo
from pretrain.errors import RecipeError
from pretrain.metrics.box_table import BoxTable
from pretrain.metrics.detection import frame_map
from pretrain.metrics.linking import LINKINGS, Linking, Tubelets, link_class
from pretrain.metrics.tubes import TUBE_PROTOCOLS, Tube, suppress_tubes, video_map

#: Protocols of frames: YOWO's numbers leave frames without truth out, HIT's have no suppression of their own.
FRAME_VARIANTS = ("act", "moc", "annotated", "voc")
#: Stands for the number of the fold in names of files.
FOLD = "{fold}"
#: Mean over these IoU.
STRICT = "0.5:0.95"


def score_tubes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print and give all numbers of a file of detections, or of one a fold and their means.

    Args:
        arguments: from_csv, truth, labels, videos, first_frame, fold (a number or "all"), linking.

    Raises:
        RecipeError: files that don't fit each other, an unknown name of linking, or folds in one file.
    """
    if arguments.linking not in LINKINGS:
        raise RecipeError(f"--linking: found {arguments.linking!r}, allowed: {', '.join(LINKINGS)}")
    # Boxes on frames: a frame without one ends a tube, as MOC has it; ACT's own rule divides by zero there.
    linking = replace(LINKINGS[arguments.linking], close_after=1)
    print(f"linking {arguments.linking}: {linking}")
    if arguments.fold != "all":
        return {"linking": vars(linking)} | _score(arguments, arguments.from_csv, arguments.fold, linking)
    if FOLD not in arguments.from_csv:
        raise RecipeError(
            f"--from-csv {arguments.from_csv}: with --fold all a file of each fold's model is needed, since folds "
            f"share test videos; write {FOLD} where the names have its number, as in found_{FOLD}.csv"
        )
    folds = {}
    for fold in range(1, count_folds(arguments.truth) + 1):
        source = arguments.from_csv.replace(FOLD, str(fold))
        print(f"fold {fold}: {source}")
        folds[str(fold)] = _score(arguments, source, fold, linking)
    mean = _mean_of(list(folds.values()))
    print(f"mean of {len(folds)} folds")
    _show(mean)
    return {"linking": vars(linking)} | mean | {"folds": folds}


def _score(arguments: argparse.Namespace, source: str, fold: int, linking: Linking) -> dict[str, Any]:
    """Score one file of detections."""
    how = TruthOptions(arguments.labels, arguments.videos, arguments.first_frame)
    truth, classes = read_tube_truth(arguments.truth, fold, how)
    detections = read_yowo(source)
    _check(truth, detections, classes)
    frames = {variant: frame_map(_table(truth), _table(detections), classes.ids, variant) for variant in FRAME_VARIANTS}
    result: dict[str, Any] = {
        "frame_map": {name: {"mAP": one.mean, "by_class": one.by_class, "counts": one.counts}
                      for name, one in frames.items()}
    }  # fmt: skip
    true = true_tubes(truth)
    if true is None:
        print(f"{truth.source}: boxes have no number of their tube (person), so there is no video-mAP")
    else:
        found = _tubes(detections, linking)
        count = len(set(truth.videos))
        print(f"{count} videos, {len(true)} true tubes, {len(found)} detected; {len(detections)} boxes")
        videos = {variant: video_map(true, found, classes.ids, variant) for variant in TUBE_PROTOCOLS}
        result["video_map"] = {
            name: {"by_threshold": one.by_threshold, STRICT: one.strict, "by_class": one.by_class}
            for name, one in videos.items()
        }
    _show(result)
    return result


def _mean_of(folds: list[dict[str, Any]]) -> dict[str, Any]:
    """Average each number over the folds; classes differ between them and are left to each."""

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    frames = {name: {"mAP": mean(one["frame_map"][name]["mAP"] for one in folds)} for name in folds[0]["frame_map"]}
    videos = {
        name: {
            "by_threshold": {key: mean(one["video_map"][name]["by_threshold"][key] for one in folds)
                             for key in first["by_threshold"]},
            STRICT: mean(one["video_map"][name][STRICT] for one in folds),
        }
        for name, first in folds[0]["video_map"].items()
    }  # fmt: skip
    return {"frame_map": frames, "video_map": videos}


def _show(result: Mapping[str, Any]) -> None:
    for name, one in result["frame_map"].items():
        print(f"frame-mAP@0.5 {100 * one['mAP']:.2f} % ({name})")
    for name, one in result.get("video_map", {}).items():
        shown = ", ".join(f"@{threshold:g} {100 * value:.2f}" for threshold, value in one["by_threshold"].items())
        print(f"video-mAP {shown}, @{STRICT} {100 * one[STRICT]:.2f} % ({name})")


def _check(truth: BoxRecords, detections: BoxRecords, classes: ActionList) -> None:
    problems = []
    wrong = ~np.isin(detections.labels, list(classes.ids))
    if wrong.any():
        row = int(wrong.argmax())
        problems.append(
            f"{detections.where(row)}: class id {detections.labels[row]}; {truth.source} has "
            f"{classes.outputs} classes, from {classes.first}"
        )
    if len(detections) and detections.boxes.max() <= 2:
        problems.append(f"{detections.source}: no coordinate is above 2; pixels are expected, not shares")
    if (missing := np.isnan(detections.scores)).any():
        problems.append(f"{detections.where(int(missing.argmax()))}: no score; detections need one in the last column")
    # Frames without truth are in ACT's evaluation, so only a video can be unknown.
    videos = {*truth.videos, *(video for video, _, _ in truth.empty)}
    strange = sorted(set(detections.videos) - videos)
    if strange or not len(detections):
        problems.append(
            f"{detections.source}: {len(strange)} of {len(set(detections.videos))} videos are not in this test split "
            f"of {truth.source}, such as {strange[:3]}; there they are called like {sorted(videos)[:3]}. Look at "
            "--fold, --videos"
        )
    if problems:
        raise RecipeError(problems)


def _table(records: BoxRecords) -> BoxTable:
    scores = np.where(np.isnan(records.scores), 1.0, records.scores)
    keys = list(zip(records.videos, records.times.tolist(), strict=True))
    return BoxTable(keys, records.boxes, records.labels, scores)


def _tubes(detections: BoxRecords, linking: Linking) -> list[Tube]:
    tubes = []
    for (video, label, _), rows in rows_by(detections, np.zeros(len(detections), dtype=int)).items():
        frames, boxes = detections.times[rows].astype(int), detections.boxes[rows][:, None]
        linked = link_class(Tubelets(video, frames, boxes, detections.scores[rows][:, None]), 0, linking)
        tubes += [replace(tube, label=label) for tube in suppress_tubes(linked, linking.tube_iou)]
    return tubes
