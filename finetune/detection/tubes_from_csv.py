"""`evaluate.py --from-csv … --tubes`: frame-mAP and video-mAP of UCF101-24 and JHMDB, beside ACT's ground truth.

Detections are a csv `video, frame, x1, y1, x2, y2, class id, score`: pixels, frames and class ids from 1. Each class is
linked by itself from boxes on frames. Source: systems/action_detection.md section 5.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pretrain.data.boxes.action_list import ActionList
from pretrain.data.boxes.foreign_pickle import read_pickle
from pretrain.data.boxes.records import BoxRecords
from pretrain.data.boxes.tube_files import read_act
from pretrain.data.boxes.yowo_files import read_yowo
from pretrain.errors import RecipeError
from pretrain.metrics.box_table import BoxTable
from pretrain.metrics.detection import frame_map
from pretrain.metrics.linking import LINKINGS, Linking, Tubelets, link_class
from pretrain.metrics.tubes import TUBE_PROTOCOLS, Tube, suppress_tubes, video_map

#: Protocols of frames: YOWO's numbers leave frames without truth out, HIT's have no suppression of their own.
FRAME_VARIANTS = ("act", "moc", "annotated", "voc")


def score_tubes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print and give all numbers of a file of detections.

    Args:
        arguments: from_csv, truth (ACT's pickle), fold, linking.

    Raises:
        RecipeError: files that don't fit each other, or an unknown name of linking.
    """
    if arguments.linking not in LINKINGS:
        raise RecipeError(f"--linking: found {arguments.linking!r}, allowed: {', '.join(LINKINGS)}")
    truth, classes = read_act(arguments.truth, "test", arguments.fold)
    detections = read_yowo(arguments.from_csv)
    _check(truth, detections, classes)
    truth = replace(truth, boxes=truth.boxes * _sizes(arguments.truth, truth.videos))
    frames = {variant: frame_map(_table(truth), _table(detections), classes.ids, variant) for variant in FRAME_VARIANTS}
    # Boxes on frames: a frame without one ends a tube, as MOC has it; ACT's own rule divides by zero there.
    linking = replace(LINKINGS[arguments.linking], close_after=1)
    true, found = _true_tubes(truth), _tubes(detections, linking)
    videos = {variant: video_map(true, found, classes.ids, variant) for variant in TUBE_PROTOCOLS}
    print(f"linking {arguments.linking}: {linking}")
    print(f"{len(set(truth.videos))} videos, {len(true)} true tubes, {len(found)} detected; {len(detections)} boxes")
    for name, one in frames.items():
        print(f"frame-mAP@0.5 {100 * one.mean:.2f} % ({name})")
    for name, other in videos.items():
        shown = ", ".join(f"@{threshold:g} {100 * value:.2f}" for threshold, value in other.by_threshold.items())
        print(f"video-mAP {shown}, @0.5:0.95 {100 * other.strict:.2f} % ({name})")
    return {
        "linking": vars(linking),
        "frame_map": {name: {"mAP": one.mean, "by_class": one.by_class, "counts": one.counts}
                      for name, one in frames.items()},
        "video_map": {name: {"by_threshold": other.by_threshold, "0.5:0.95": other.strict, "by_class": other.by_class}
                      for name, other in videos.items()},
    }  # fmt: skip


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
            f"of {truth.source}, such as {strange[:3]}; there they are called like {sorted(videos)[:3]}. Look at --fold"
        )
    if problems:
        raise RecipeError(problems)


def _sizes(source: str, videos: list[str]) -> Any:
    """Give width, height, width, height of each row's video [N, 4]: shares were read, inclusive sides need pixels."""
    resolution: Mapping[str, Any] = read_pickle(source)["resolution"]
    return np.array(
        [[width, height] * 2 for height, width in (resolution[video] for video in videos)], dtype=np.float64
    )


def _table(records: BoxRecords) -> BoxTable:
    scores = np.where(np.isnan(records.scores), 1.0, records.scores)
    keys = list(zip(records.videos, records.times.tolist(), strict=True))
    return BoxTable(keys, records.boxes, records.labels, scores)


def _rows(records: BoxRecords, numbers: Any) -> dict[tuple[str, int, int], list[int]]:
    """Sort rows by video, label and a number."""
    rows = defaultdict(list)
    for row, key in enumerate(zip(records.videos, records.labels.tolist(), numbers.tolist(), strict=True)):
        rows[key].append(row)
    return rows


def _true_tubes(truth: BoxRecords) -> list[Tube]:
    tubes = []
    for (video, label, number), rows in _rows(truth, truth.persons).items():
        frames = truth.times[rows].astype(int)
        if (np.diff(frames) != 1).any():
            raise RecipeError(f"{truth.source}: tube {number} of {video}: its frames are not consecutive")
        tubes.append(Tube(video, label, int(frames[0]), truth.boxes[rows]))
    return tubes


def _tubes(detections: BoxRecords, linking: Linking) -> list[Tube]:
    tubes = []
    for (video, label, _), rows in _rows(detections, np.zeros(len(detections), dtype=int)).items():
        frames, boxes = detections.times[rows].astype(int), detections.boxes[rows][:, None]
        linked = link_class(Tubelets(video, frames, boxes, detections.scores[rows][:, None]), 0, linking)
        tubes += [replace(tube, label=label) for tube in suppress_tubes(linked, linking.tube_iou)]
    return tubes
