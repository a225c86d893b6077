"""Tubes, boxes of one actor on consecutive frames: how much two cover each other, and video-mAP.

| variant | source | IoU in space and time | a tube that is found | area |
|---|---|---|---|---|
| `act` | ACT, MOC | sides and lengths inclusive | is out of the game | trapezoid |
| `voc` | HIT | x2 - x1, and last - first frame | keeps its rivals' overlap | envelope |

Numbers of the two are not comparable. Source: systems/action_detection.md section 5.4.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.errors import DataError
from pretrain.metrics.average_precision import envelope_area, trapezoid_area
from pretrain.metrics.detection import STRICT
from pretrain.metrics.matching import Matching, pairs
from pretrain.metrics.overlap import FloatArray, iou_continuous, iou_inclusive

#: IoU in space and time at which video-mAP is published, beside the mean over 0.50, 0.55 ... 0.95.
PUBLISHED = (0.2, 0.5, 0.75)


@dataclass(frozen=True)
class Tube:
    """Boxes on consecutive frames.

    Attributes:
        video: name.
        label: output index.
        first: number of the first frame.
        boxes: float64 [n, 4], xyxy in pixels, a row a frame; at least one.
        score: of the whole tube; 1 for a true one.
        frame_scores: of each frame [n]; `score` where left out.

    Raises:
        DataError: no box, or a number that is not finite.
    """

    video: str
    label: int
    first: int
    boxes: FloatArray
    score: float = 1.0
    frame_scores: FloatArray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, dtype=np.float64).reshape(-1, 4)
        scores = np.full(len(boxes), self.score) if self.frame_scores is None else np.asarray(self.frame_scores)
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "frame_scores", scores)
        where = f"tube of label {self.label} in {self.video} from frame {self.first}"
        if not len(boxes) or len(scores) != len(boxes):
            raise DataError(f"{where}: {len(boxes)} boxes, {len(scores)} scores; needed are as many, and at least one")
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all() and np.isfinite(self.score)):
            raise DataError(
                f"{where}: a box or score is not finite; look for what made it, such as a network that diverged"
            )

    @property
    def last(self) -> int:
        """Number of the last frame."""
        return self.first + len(self.boxes) - 1


def tube_iou_inclusive(first: Tube, second: Tube) -> float:
    """Multiply the mean IoU on common frames with common frames / frames of both together (ACT's `iou3dt`)."""
    return _tube_iou(first, second, 1)


def tube_iou_continuous(first: Tube, second: Tube) -> float:
    """Compute the same where a tube is last - first frame long and a box x2 - x1 wide (HIT).

    Tubes that share one frame overlap by 0, and so do two of one frame each (0/0 in the source).
    """
    return _tube_iou(first, second, 0)


def _tube_iou(first: Tube, second: Tube, frame: int) -> float:
    start, end = max(first.first, second.first), min(first.last, second.last)
    union = max(first.last, second.last) - min(first.first, second.first) + frame
    if end < start or not union:
        return 0.0
    boxes = [tube.boxes[start - tube.first : end + 1 - tube.first] for tube in (first, second)]
    overlap = (iou_inclusive if frame else iou_continuous)(*boxes).mean()
    return float(overlap) * (end - start + frame) / union


def suppress_tubes(tubes: Sequence[Tube], threshold: float = 0.3) -> list[Tube]:
    """Keep the best of tubes of one video and label that overlap by more than the threshold (inclusive); best first.

    Of equal scores the earlier tube counts as better. Source: section 5.3, step 6; ACT's `nms3dt`.
    """
    kept: list[Tube] = []
    for tube in sorted(tubes, key=lambda tube: -tube.score):
        if all(tube_iou_inclusive(tube, better) <= threshold for better in kept):
            kept.append(tube)
    return kept


@dataclass(frozen=True)
class TubeProtocol:
    """What a variant of video-mAP does: overlap of tubes, `free` matching (matching.py), area under the curve."""

    iou: Callable[[Tube, Tube], float]
    free: bool
    area: Callable[..., float]


TUBE_PROTOCOLS = {
    "act": TubeProtocol(tube_iou_inclusive, True, trapezoid_area),
    "voc": TubeProtocol(tube_iou_continuous, False, envelope_area),
}


@dataclass(frozen=True)
class VideoMap:
    """What `video_map` finds; precisions are shares in [0, 1].

    Attributes:
        variant: name of the protocol.
        by_threshold: mAP at each IoU.
        strict: mean of mAP at IoU 0.50, 0.55 ... 0.95.
        by_class: AP at each IoU of each class; None for a class without truth, which the means leave out.
        truths: true tubes of each class.
        detections: detected tubes of each class.
    """

    variant: str
    by_threshold: dict[float, float]
    strict: float
    by_class: dict[float, dict[int, float | None]]
    truths: dict[int, int]
    detections: dict[int, int]


def video_map(
    truth: Sequence[Tube],
    detections: Sequence[Tube],
    classes: Iterable[int],
    variant: str = "act",
    *,
    thresholds: Sequence[float] = PUBLISHED,
) -> VideoMap:
    """Compute the mean average precision of tubes; of equal scores the earlier counts first.

    Args:
        truth: true tubes of all test videos.
        detections: linked and suppressed tubes of all test videos (linking.py).
        classes: labels that are evaluated; tubes of others are left out.
        variant: a name of TUBE_PROTOCOLS.
        thresholds: IoU in space and time from which a tube is found.

    Raises:
        DataError: an unknown variant, or no true tube of any class that is evaluated.
    """
    if variant not in TUBE_PROTOCOLS:
        raise DataError(f"video-mAP: found variant {variant!r}, allowed: {', '.join(TUBE_PROTOCOLS)}")
    protocol, labels = TUBE_PROTOCOLS[variant], sorted(set(classes))
    by_class: dict[float, dict[int, float | None]] = {one: {} for one in dict.fromkeys([*thresholds, *STRICT])}
    truths, rows = {}, {}
    for label in labels:
        true = [tube for tube in truth if tube.label == label]
        found = sorted((tube for tube in detections if tube.label == label), key=lambda tube: -tube.score)
        truths[label], rows[label] = len(true), len(found)
        matching = _matching(found, true, protocol)
        for threshold, precisions in by_class.items():
            hits = (matching.hits_by_free if protocol.free else matching.hits_by_best)(threshold)
            precisions[label] = protocol.area(hits, len(true)) if true else None
    if not any(truths.values()):
        raise DataError(f"video-mAP: none of {len(truth)} true tubes is of the {len(labels)} evaluated labels")
    means = {one: _mean(precisions) for one, precisions in by_class.items()}
    return VideoMap(
        variant=variant,
        by_threshold={one: means[one] for one in thresholds},
        strict=sum(means[one] for one in STRICT) / len(STRICT),
        by_class={one: by_class[one] for one in thresholds},
        truths=truths,
        detections=rows,
    )


def _matching(found: Sequence[Tube], true: Sequence[Tube], protocol: TubeProtocol) -> Matching:
    codes = {name: number for number, name in enumerate({tube.video for tube in [*found, *true]})}
    groups = [np.array([codes[tube.video] for tube in tubes], dtype=np.int64) for tubes in (found, true)]
    rows, truths = pairs(*groups)
    overlaps = [protocol.iou(true[j], found[i]) for i, j in zip(rows.tolist(), truths.tolist(), strict=True)]
    return Matching(len(found), rows, truths, np.array(overlaps, dtype=np.float64))


def _mean(precisions: Mapping[int, float | None]) -> float:
    there = [value for value in precisions.values() if value is not None]
    return sum(there) / len(there)


def mean_of_splits(splits: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """Average what is measured at each IoU over data splits, as JHMDB's numbers are published (three of them).

    Raises:
        DataError: splits were measured at other thresholds.
    """
    if len({tuple(split) for split in splits}) != 1:
        raise DataError(
            f"mean of splits: found {[list(split) for split in splits]} as thresholds; all splits need the same"
        )
    return {one: sum(split[one] for split in splits) / len(splits) for one in splits[0]}
