"""A detector's answer for a keyframe, which evaluation, files and pictures share."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.samples import Batch
from pretrain.metrics.box_table import BoxTable
from pretrain.samples.box_transforms import Convention, shares_from_pixels

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Detections:
    """Persons of one keyframe with what they do.

    Attributes:
        video: name in the annotation.
        time: in the annotation: seconds, or a frame's number.
        boxes: float32 [n, 4], shares of the original frame, x1 y1 x2 y2.
        scores: float32 [n, K], probabilities; a person detector's score is multiplied in where the system does so.
            Of true persons: 1 for each of their labels.
    """

    video: str
    time: float
    boxes: Floats
    scores: Floats


def answers_of(batch: Batch, boxes: Floats, scores: Floats, counts: list[int], rules: Convention) -> list[Detections]:
    """Give the answers to a batch's keyframes.

    Args:
        batch: of samples/boxes.py.
        boxes: float32 [N, 4] in pixels of the resized frames, clip after clip.
        scores: float32 [N, K].
        counts: boxes of each clip.
        rules: how boxes count pixels.
    """
    answers, first = [], 0
    sizes, originals, times = (batch[name].tolist() for name in ("sizes", "originals", "times"))
    for clip, count in enumerate(counts):
        rows = slice(first, first + count)
        (height, width), (old_height, old_width) = sizes[clip], originals[clip]
        shares = shares_from_pixels(boxes[rows], (width, height), (old_width, old_height), rules)
        answers.append(Detections(batch["videos"][clip], times[clip], shares, scores[rows]))
        first += count
    return answers


def truth_of(batch: Batch, rules: Convention) -> list[Detections]:
    """Give the annotated persons of a batch of judged clips, as answers whose scores are their labels."""
    boxes, labels = (batch[name].cpu().numpy() for name in ("truth_boxes", "truth_labels"))
    return answers_of(batch, boxes, labels, batch["truth_counts"].tolist(), rules)


def table_of(answers: Iterable[Detections], truth: bool = False) -> BoxTable:
    """Bring answers into the columns that metrics take: a row a box and label.

    Args:
        answers: of different keyframes.
        truth: of annotated persons, whose rows are their labels; else each box has a row for every class.
    """
    rows = [one for one in answers if len(one.boxes)]
    keyframes = [(one.video, one.time) for one in rows for _ in one.boxes]
    boxes = np.concatenate([np.zeros((0, 4)), *(one.boxes for one in rows)])
    scores = np.concatenate([one.scores for one in rows]).astype(np.float64) if rows else np.zeros((0, 0))
    if truth:
        return BoxTable.from_labels(keyframes, boxes, scores)
    return BoxTable.from_scores(keyframes, boxes, scores)
