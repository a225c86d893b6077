"""COCO's average precision and recall of found objects, by their boxes or their masks.

A picture is matched by itself, which leaves a few numbers of each object found; those of all pictures together give the
scores. So pictures are dealt out to ranks, and no mask travels. Numbers are those of pycocotools' `COCOeval`, whose
rules these are: the best 100 of a class in a picture, each true object found once, crowds and objects of another size
than is asked for count neither as found nor as missed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.metrics.overlap import BoolArray, FloatArray, IntArray

#: IoU from which an object is found, and recalls at which precision is read.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
#: Most objects found of a class in a picture; smaller numbers are asked for recall alone.
CAPS = (1, 10, 100)
#: Areas in pixels, both ends included, by name.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}


@dataclass(frozen=True)
class TrueObjects:
    """What is in a picture.

    Attributes:
        labels: int64 [G].
        areas: pixels by which objects are told small from large, as annotated [G].
        crowd: several objects as one, bool [G]: what is found on it counts neither way.
    """

    labels: IntArray
    areas: FloatArray
    crowd: BoolArray


@dataclass(frozen=True)
class PictureMatches:
    """What of a picture's objects was found, for each area range (A) and threshold (T).

    Attributes:
        labels: of what was found, int64 [D], by class and falling score.
        scores: [D].
        places: number among those of its class, by falling score, int64 [D].
        right: it found an object, bool [A, T, D].
        ignored: it counts neither way, bool [A, T, D].
        true_labels: of the objects that are there, int64 [G].
        uncounted: they count neither way, bool [A, G].
    """

    labels: IntArray
    scores: FloatArray
    places: IntArray
    right: BoolArray
    ignored: BoolArray
    true_labels: IntArray
    uncounted: BoolArray


@dataclass(frozen=True)
class CocoScores:
    """Scores as shares; NaN where there is nothing to find.

    Attributes:
        precision: at the recalls, [T, R, K, A].
        recall: [T, K, A, M] for M caps.
    """

    precision: FloatArray
    recall: FloatArray

    def named(self) -> dict[str, float]:
        """Give COCO's twelve numbers by their usual names."""
        last, small = len(CAPS) - 1, list(AREAS).index("small")
        sizes = list(enumerate("sml", small))
        found = {"AP": _mean(self.precision[..., 0])}
        found |= {f"AP{round(100 * THRESHOLDS[at])}": _mean(self.precision[at, ..., 0]) for at in (0, 5)}
        found |= {f"AP{letter}": _mean(self.precision[..., area]) for area, letter in sizes}
        found |= {f"AR{cap}": _mean(self.recall[:, :, 0, at]) for at, cap in enumerate(CAPS)}
        return found | {f"AR{letter}": _mean(self.recall[:, :, area, last]) for area, letter in sizes}

    def by_class(self) -> list[float]:
        """Give each class' AP; NaN for one without objects."""
        return [_mean(self.precision[:, :, number, 0]) for number in range(self.precision.shape[2])]


def box_overlaps(found: FloatArray, true: FloatArray, crowd: BoolArray) -> FloatArray:
    """Divide intersection by union of boxes xyxy [D, 4] and [G, 4], [D, G]; on crowds by what was found alone."""
    sides = np.minimum(found[:, None, 2:], true[None, :, 2:]) - np.maximum(found[:, None, :2], true[None, :, :2])
    common = np.maximum(sides, 0).prod(2)
    areas, true_areas = ((one[:, 2:] - one[:, :2]).prod(1) for one in (found, true))
    return _shares(common, areas, true_areas, crowd)


def mask_overlaps(found: BoolArray, true: BoolArray, crowd: BoolArray) -> FloatArray:
    """Divide intersection by union of masks [D, H, W] and [G, H, W], [D, G]; on crowds by what was found alone."""
    # float32 counts exactly up to 16 million; pictures may have more pixels (decoders/image.py).
    kind: Any = np.float32 if found[:1].size < 1 << 24 else np.float64
    flat, true_flat = (one.reshape(len(one), one.shape[1] * one.shape[2]).astype(kind) for one in (found, true))
    areas, true_areas = (one.sum((1, 2), dtype=np.float64) for one in (found, true))
    return _shares((flat @ true_flat.T).astype(np.float64), areas, true_areas, crowd)


def _shares(common: FloatArray, areas: FloatArray, true_areas: FloatArray, crowd: BoolArray) -> FloatArray:
    whole = areas[:, None] + np.where(crowd, 0.0, true_areas[None] - common)
    return np.divide(common, whole, out=np.zeros_like(common), where=whole > 0)


def best_of_classes(labels: IntArray, scores: FloatArray) -> tuple[IntArray, IntArray]:
    """Order what was found by class and falling score, and cut off what COCO does not look at.

    Returns:
        rows int64 [D], and their places among those of their class, int64 [D].
    """
    order = np.lexsort((-scores, labels))
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    places = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    looked_at = places < CAPS[-1]
    return order[looked_at], places[looked_at]


def match_picture(
    labels: IntArray, scores: FloatArray, places: IntArray, areas: FloatArray, overlaps: FloatArray, true: TrueObjects
) -> PictureMatches:
    """Find which objects of a picture were found.

    Args:
        labels: of what was found, in the order of `best_of_classes`, int64 [D].
        scores: [D].
        places: of `best_of_classes`, int64 [D].
        areas: pixels of what was found [D].
        overlaps: IoU of what was found with what is there, [D, G]; only those of one class are looked at.
        true: what is there.
    """
    uncounted = np.stack([true.crowd | _outside(true.areas, limits) for limits in AREAS.values()])
    shape = (len(AREAS), len(THRESHOLDS), len(labels))
    right, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    for label in np.unique(labels):
        rows, there = np.flatnonzero(labels == label), np.flatnonzero(true.labels == label)
        parts = _match_class(overlaps[np.ix_(rows, there)], uncounted[:, there], true.crowd[there])
        right[:, :, rows], ignored[:, :, rows] = parts
    outside = np.stack([_outside(areas, limits) for limits in AREAS.values()])[:, None]
    return PictureMatches(labels, scores, places, right, ignored | (~right & outside), true.labels, uncounted)


def _match_class(overlaps: FloatArray, uncounted: BoolArray, crowd: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Match what was found of one class, by falling score, at all thresholds and area ranges at once.

    Returns:
        found an object, and found one that does not count, bool [A, T, D] both.
    """
    count, there = overlaps.shape
    free = np.ones((len(AREAS), len(THRESHOLDS), there), bool)
    right = np.zeros((len(AREAS), len(THRESHOLDS), count), bool)
    ignored = right.copy()
    if not there:
        return right, ignored
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[None, :, None]
    for row, shares in enumerate(overlaps):
        possible = (free | crowd) & (shares >= least)
        counted = possible & ~uncounted[:, None]
        # One that counts goes before any that does not, however much it overlaps less.
        chosen = np.where(counted.any(2, keepdims=True), counted, possible)
        # The last of equal ones, as COCO's loop leaves them.
        best = there - 1 - np.where(chosen, shares, -1.0)[..., ::-1].argmax(2)
        found = chosen.any(2)
        right[..., row] = found
        ignored[..., row] = found & np.take_along_axis(uncounted, best, 1)
        areas, thresholds = np.nonzero(found)
        free[areas, thresholds, best[areas, thresholds]] = False
    return right, ignored


def _outside(areas: FloatArray, limits: tuple[float, float]) -> BoolArray:
    return (areas < limits[0]) | (areas > limits[1])


def coco_scores(pictures: Sequence[PictureMatches], classes: int) -> CocoScores:
    """Score all pictures together, in an order that is the same however they were dealt out: equal scores count in it.

    Args:
        pictures: that were matched.
        classes: K.
    """
    precision = np.full((len(THRESHOLDS), len(RECALLS), classes, len(AREAS)), np.nan)
    recall = np.full((len(THRESHOLDS), classes, len(AREAS), len(CAPS)), np.nan)
    if not pictures:
        return CocoScores(precision, recall)
    labels, scores, places, true_labels = (
        np.concatenate([getattr(one, name) for one in pictures])
        for name in ("labels", "scores", "places", "true_labels")
    )
    right, ignored, uncounted = (
        np.concatenate([getattr(one, name) for one in pictures], axis=-1)
        for name in ("right", "ignored", "uncounted")
    )
    order = np.argsort(-scores, kind="stable")
    for label in range(classes):
        of_class, there = order[labels[order] == label], true_labels == label
        for area in range(len(AREAS)):
            truths = int((there & ~uncounted[area]).sum())
            if not truths:
                continue
            for at, cap in enumerate(CAPS):
                rows = of_class[places[of_class] < cap]
                curves = _curves(right[area][:, rows], ignored[area][:, rows], truths)
                recall[:, label, area, at] = curves[1]
                if cap == CAPS[-1]:
                    precision[:, :, label, area] = curves[0]
    return CocoScores(precision, recall)


def _curves(right: BoolArray, ignored: BoolArray, truths: int) -> tuple[FloatArray, FloatArray]:
    """Compute precision at the recalls [T, R] and the last recall [T] of rows [T, n] by falling score."""
    hits = np.cumsum(right & ~ignored, axis=1, dtype=np.float64)
    misses = np.cumsum(~right & ~ignored, axis=1, dtype=np.float64)
    reached = hits / truths
    precise = hits / np.maximum(hits + misses, 1)
    envelope = np.maximum.accumulate(precise[:, ::-1], axis=1)[:, ::-1]
    sampled: npt.NDArray[np.float64] = np.stack(
        [np.append(best, 0.0)[np.searchsorted(one, RECALLS, side="left")]
         for best, one in zip(envelope, reached, strict=True)]
    )  # fmt: skip
    last = reached[:, -1] if reached.shape[1] else np.zeros(len(reached))
    return sampled, last


def _mean(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
