"""Frame-mAP of detected boxes with labels: AVA in its three variants, UCF101-24 and JHMDB in theirs.

| variant | sources | what it does |
|---|---|---|
| `activitynet` | ActivityNet since 2019, official for AVA | best 50 of a keyframe, unlisted keyframes ignored |
| `slowfast` | SlowFast, EVAD | rows of a keyframe are matched in the order in which they stand; no cap; exclusions |
| `alphaction` | AlphAction, CycleACR, VideoMAE's detector | falling score; no cap; exclusions |
| `act` | ACT | inclusive sides, suppression at 0.3, a found box is out of the game, trapezoid area |
| `moc` | MOC | as `act`, suppression soft and at 0.6 |
| `annotated` | YOWO | as `act`, frames without a true box left out |
| `voc` | HIT, MultiSports | continuous sides, no suppression, best box before taken, area under the envelope |
| `coco` | COCO; EVAD's persons | best 100 of a keyframe, unlisted keyframes ignored, a found box is out of the game |

Numbers of two variants are not comparable: they differ by several points on the same detections. Equal scores count in
the order in which rows stand (a stable sort); the official codes leave that to an unstable one.

Source: systems/action_detection.md sections 4 and 5.2.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pretrain.errors import DataError
from pretrain.metrics.average_precision import envelope_area, sampled_area, trapezoid_area
from pretrain.metrics.box_table import BoxTable, CodedBoxes, KeyframeCodes, Keyframes
from pretrain.metrics.matching import Matching
from pretrain.metrics.overlap import (
    BoolArray,
    FloatArray,
    IntArray,
    best_of_groups,
    iou_function,
    iou_inclusive,
    soften,
    suppress,
)

#: IoU 0.50, 0.55 ... 0.95, as EVAD's strict numbers and the mean of video-mAP take them.
STRICT = tuple(np.linspace(0.5, 0.95, 10).tolist())
#: Labelled boxes of a keyframe that ActivityNet looks at, and COCO.
OFFICIAL_CAP = 50
COCO_CAP = 100


@dataclass(frozen=True)
class Protocol:
    """What a variant does.

    Attributes:
        by_score: rows of a keyframe are matched by falling score; otherwise as they stand.
        cap: rows of a keyframe that are looked at, the best over all its classes; None: all.
        listed_only: rows on keyframes that the truth does not list are ignored; otherwise they are wrong.
        exclusions: takes a list of keyframes to leave out.
        with_area: rows without area are dropped.
        inclusive: sides are x2 - x1 + 1.
        suppression: IoU (inclusive sides) above which a box beside a better one of its class is suppressed first;
            None: none is.
        soft: suppressed boxes stay with a lower score.
        free: a row may find the best box that is still free; otherwise its best box or none.
        area: under the curve.
    """

    by_score: bool = True
    cap: int | None = None
    listed_only: bool = False
    exclusions: bool = False
    with_area: bool = False
    inclusive: bool = False
    suppression: float | None = None
    soft: bool = False
    free: bool = False
    area: Callable[[BoolArray, int], float] = envelope_area


_ACT = Protocol(exclusions=True, inclusive=True, suppression=0.3, free=True, area=trapezoid_area)
PROTOCOLS = {
    "activitynet": Protocol(cap=OFFICIAL_CAP, listed_only=True, with_area=True),
    "slowfast": Protocol(by_score=False, exclusions=True, with_area=True),
    "alphaction": Protocol(exclusions=True, with_area=True),
    "act": _ACT,
    "moc": replace(_ACT, suppression=0.6, soft=True),
    "annotated": replace(_ACT, listed_only=True),
    "voc": Protocol(exclusions=True),
    "coco": Protocol(cap=COCO_CAP, listed_only=True, exclusions=True, free=True, area=sampled_area),
}


@dataclass(frozen=True)
class FrameMap:
    """What `frame_map` finds; precisions are shares in [0, 1].

    Attributes:
        variant: name of the protocol.
        mean: mAP, over classes with truth and over thresholds.
        by_class: AP of each class, mean over thresholds; None for a class without truth, which the mean leaves out.
        by_threshold: mAP at each IoU.
        counts: keyframes and rows that were there, used, and left out, by reason.
        truths: rows of truth of each class.
        detections: rows that were scored, of each class.
    """

    variant: str
    mean: float
    by_class: dict[int, float | None]
    by_threshold: dict[float, float]
    counts: dict[str, int]
    truths: dict[int, int]
    detections: dict[int, int]


def frame_map(
    truth: BoxTable,
    detections: BoxTable,
    classes: Iterable[int],
    variant: str = "activitynet",
    *,
    thresholds: Sequence[float] = (0.5,),
    listed: Keyframes = (),
    excluded: Keyframes = (),
) -> FrameMap:
    """Compute the mean average precision of boxes with labels.

    Args:
        truth: true boxes, a row a label.
        detections: found boxes, a row a label.
        classes: labels that are evaluated, AVA's 60 for example; rows of others are left out.
        variant: a name of PROTOCOLS.
        thresholds: IoU from which a box is found.
        listed: keyframes that were annotated and have no box, in the same keys as the tables' (a row of two fields in
            AVA's csv); what is detected there is wrong in every variant.
        excluded: keyframes to leave out in both tables.

    Raises:
        DataError: an unknown variant, exclusions for one that has none, or no truth of any class that is evaluated.
    """
    protocol = _protocol(variant, excluded)
    names = np.unique(np.asarray(list(classes), dtype=np.int64))
    codes = KeyframeCodes()
    true, found = codes.table(truth), codes.table(detections)
    out = codes.number(excluded)
    known = np.union1d(true.keyframes, codes.number(listed))
    counts = {"truth_keyframes": len(np.unique(true.keyframes)), "truth_rows": len(true),
              "detection_keyframes": len(np.unique(found.keyframes)), "detection_rows": len(found)}  # fmt: skip
    true, dropped = _select(true, names, out)
    counts |= {f"truth_{reason}": count for reason, count in dropped.items()}
    found, dropped = _select(found, names, out)
    counts |= {f"detection_{reason}": count for reason, count in dropped.items()}
    if not len(true):
        raise DataError(
            f"frame-mAP: none of {counts['truth_rows']} rows of truth is of an evaluated class on a keyframe that is "
            f"not excluded; evaluated are {len(names)} labels {names[:5].tolist()} ...: give classes in the same "
            "counting as the table's labels"
        )
    found, dropped = _prepare(found, protocol, known)
    counts |= {f"detection_{reason}": count for reason, count in dropped.items()}
    counts |= {"truth_rows_used": len(true), "detection_rows_used": len(found)}
    precisions = _precisions(true, found, len(names), protocol, thresholds)
    return _summary(variant, names, thresholds, precisions, counts, true, found)


def strict_precision(
    truth: BoxTable, detections: BoxTable, classes: Iterable[int], *, excluded: Keyframes = ()
) -> dict[str, float]:
    """Compute EVAD's strict numbers in percent, as `slowfast`: AP (mean of IoU 0.50, 0.55 ... 0.95), AP50, AP75."""
    found = frame_map(truth, detections, classes, "slowfast", thresholds=STRICT, excluded=excluded).by_threshold
    mean = sum(found.values()) / len(found)
    return {"AP": 100 * mean, "AP50": 100 * found[STRICT[0]], "AP75": 100 * found[STRICT[5]]}


def person_precision(
    truth: BoxTable, detections: BoxTable, *, listed: Keyframes = (), excluded: Keyframes = ()
) -> FrameMap:
    """Compute how well persons are found, whatever they do, as `coco`: `by_threshold` holds IoU 0.50, 0.55 ... 0.95.

    Args:
        truth: of a person with several labels all rows, which are one box.
        detections: rows of one box count once, with the highest score.
        listed, excluded: as `frame_map` takes them.

    Raises:
        DataError: no true box.

    Source: systems/evad.md section 5, computed from rows as its section on open issues proposes.
    """
    true, found = one_of_each_box(truth), one_of_each_box(detections)
    return frame_map(true, found, [0], "coco", thresholds=STRICT, listed=listed, excluded=excluded)


def one_of_each_box(table: BoxTable) -> BoxTable:
    """Leave one row, of label 0, of all that share keyframe and box: the first of those with the highest score."""
    codes = KeyframeCodes().number(table.keyframes)
    order = np.argsort(-table.scores, kind="stable")
    rows = np.column_stack((codes, table.boxes))[order]
    _, first = np.unique(rows, axis=0, return_index=True)
    kept = np.sort(order[first])
    keyframes = [table.keyframes[row] for row in kept.tolist()]
    return BoxTable(keyframes, table.boxes[kept], np.zeros(len(kept), np.int64), table.scores[kept])


def _protocol(variant: str, excluded: Keyframes) -> Protocol:
    if variant not in PROTOCOLS:
        raise DataError(f"frame-mAP: found variant {variant!r}, allowed: {', '.join(PROTOCOLS)}")
    if len(excluded) and not PROTOCOLS[variant].exclusions:
        allowed = ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.exclusions)
        raise DataError(
            f"frame-mAP: variant {variant} knows no excluded keyframes, found {len(excluded)}; leave them out (what is "
            f"detected on keyframes that the truth does not list is ignored anyway), or take {allowed}"
        )
    return PROTOCOLS[variant]


def _select(table: CodedBoxes, names: IntArray, excluded: IntArray) -> tuple[CodedBoxes, dict[str, int]]:
    """Leave out excluded keyframes and labels that are not evaluated; labels become positions in `names`."""
    out = np.isin(table.keyframes, excluded)
    other = ~np.isin(table.labels, names)
    kept = table.rows(~out & ~other)
    counts = {"rows_excluded": int(out.sum()), "rows_of_other_classes": int((other & ~out).sum())}
    return CodedBoxes(kept.keyframes, kept.boxes, np.searchsorted(names, kept.labels), kept.scores), counts


def _prepare(table: CodedBoxes, protocol: Protocol, known: IntArray) -> tuple[CodedBoxes, dict[str, int]]:
    """Leave out the rows that a protocol does not look at, and put the others in the order of matching."""
    unknown = ~np.isin(table.keyframes, known)
    counts = {"keyframes_unlisted": len(np.unique(table.keyframes[unknown])), "rows_unlisted": int(unknown.sum())}
    if protocol.listed_only:
        table = table.rows(~unknown)
    before = len(table)
    if protocol.cap is not None:
        table = table.rows(best_of_groups(table.keyframes, table.scores, protocol.cap))
    counts["rows_over_the_cap"] = before - len(table)
    before = len(table)
    if protocol.with_area:
        table = table.rows(np.all(table.boxes[:, 2:] > table.boxes[:, :2], axis=1))
    counts["rows_without_area"] = before - len(table)
    before = len(table)
    if protocol.suppression is not None:
        table = _suppressed(table, protocol.suppression, protocol.soft)
    counts["rows_suppressed"] = before - len(table)
    return (table.rows(np.argsort(-table.scores, kind="stable")) if protocol.by_score else table), counts


def suppressed(table: BoxTable, threshold: float = 0.3, *, soft: bool = False) -> BoxTable:
    """Suppress boxes beside better ones of their keyframe and label, as ACT does; soft: lower their score, as MOC does.

    Args:
        table: of boxes in pixels, its labels not negative.
        threshold: IoU with inclusive sides above which a box is dropped or lowered.

    Returns:
        What is left, in the same order; its keyframes are numbered in the order in which they come first.
    """
    left = _suppressed(KeyframeCodes().table(table), threshold, soft)
    return BoxTable(left.keyframes, left.boxes, left.labels, left.scores)


def _suppressed(table: CodedBoxes, threshold: float, soft: bool) -> CodedBoxes:
    groups = table.groups()
    if soft:
        return replace(table, scores=soften(groups, table.boxes, table.scores, threshold, iou_inclusive))
    return table.rows(np.sort(suppress(groups, table.boxes, table.scores, threshold, iou_inclusive)))


def _precisions(
    truth: CodedBoxes, detections: CodedBoxes, classes: int, protocol: Protocol, thresholds: Sequence[float]
) -> FloatArray:
    """Compute AP [thresholds, classes]; NaN for a class without truth."""
    matching = Matching.of_boxes(
        detections.keyframes * classes + detections.labels, detections.boxes,
        truth.keyframes * classes + truth.labels, truth.boxes, iou_function(protocol.inclusive),
    )  # fmt: skip
    order = np.lexsort((-detections.scores, detections.labels))
    bounds = np.searchsorted(detections.labels[order], np.arange(classes + 1))
    truths = np.bincount(truth.labels, minlength=classes)
    result = np.full((len(thresholds), classes), np.nan)
    for place, threshold in enumerate(thresholds):
        hits = (matching.hits_by_free if protocol.free else matching.hits_by_best)(threshold)[order]
        for one in np.flatnonzero(truths):
            result[place, one] = protocol.area(hits[bounds[one] : bounds[one + 1]], int(truths[one]))
    return result


def _summary(
    variant: str,
    names: IntArray,
    thresholds: Sequence[float],
    precisions: FloatArray,
    counts: dict[str, int],
    truth: CodedBoxes,
    detections: CodedBoxes,
) -> FrameMap:
    there = ~np.isnan(precisions[0])
    means = precisions[:, there].mean(axis=1)
    by_class = [float(value) if has else None for value, has in zip(precisions.mean(axis=0), there, strict=True)]
    rows = [np.bincount(table.labels, minlength=len(names)).tolist() for table in (truth, detections)]
    labels = names.tolist()
    return FrameMap(
        variant=variant,
        mean=float(means.mean()),
        by_class=dict(zip(labels, by_class, strict=True)),
        by_threshold=dict(zip(map(float, thresholds), means.tolist(), strict=True)),
        counts=counts,
        truths=dict(zip(labels, rows[0], strict=True)),
        detections=dict(zip(labels, rows[1], strict=True)),
    )
