"""How much boxes cover each other, in the two conventions that published numbers use.

`inclusive`: coordinates are pixels that belong to the box, so that a side is x2 - x1 + 1 long (ACT, AlphAction).
`continuous`: a side is x2 - x1 long (ActivityNet, COCO). The areas of a box of 10 pixels differ by a fifth, so numbers
of the two are not comparable, and every function says which one it is.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Iou = Callable[[FloatArray, FloatArray], FloatArray]


def iou_inclusive(first: FloatArray, second: FloatArray) -> FloatArray:
    """Divide intersection by union of boxes [..., 4] xyxy against boxes [..., 4], broadcast; sides are x2 - x1 + 1."""
    return _iou(first, second, 1.0)


def iou_continuous(first: FloatArray, second: FloatArray) -> FloatArray:
    """Divide intersection by union of boxes [..., 4] xyxy against boxes [..., 4], broadcast; sides are x2 - x1.

    Two boxes without area overlap by 0.
    """
    return _iou(first, second, 0.0)


def _iou(first: FloatArray, second: FloatArray, pixel: float) -> FloatArray:
    corner = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    common = np.maximum(corner + pixel, 0).prod(axis=-1)
    union = _area(first, pixel) + _area(second, pixel) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union != 0)


def _area(boxes: FloatArray, pixel: float) -> FloatArray:
    area: FloatArray = (boxes[..., 2:] - boxes[..., :2] + pixel).prod(axis=-1)
    return area


def iou_function(inclusive: bool) -> Iou:
    """Choose the convention."""
    return iou_inclusive if inclusive else iou_continuous


def suppress(groups: IntArray, boxes: FloatArray, scores: FloatArray, threshold: float, iou: Iou) -> IntArray:
    """Keep the best box of each heap: greedy non-maximum suppression inside each group, all groups at once.

    Ties of scores: the earlier row goes first. A box that overlaps by exactly the threshold stays (ACT's rule).

    Args:
        groups: which boxes are compared, int64 [N]; for example a code of frame and class.
        boxes: xyxy [N, 4], or [N, K, 4] for tubelets, which overlap by the mean over their K boxes.
        scores: [N].
        threshold: a box that overlaps a better, kept one by more than this is dropped.
        iou: convention of areas.

    Returns:
        Rows that are kept, by group and falling score.
    """
    kept = np.flatnonzero(np.isnan(_overlap_with_better(groups, boxes, scores, threshold, iou)))
    return kept[np.lexsort((-scores[kept], groups[kept]))]


def soften(groups: IntArray, boxes: FloatArray, scores: FloatArray, threshold: float, iou: Iou) -> FloatArray:
    """Give boxes that `suppress` would drop 1 - IoU of their score and keep all, [N] (MOC); arguments as `suppress`.

    A box is lowered once, by the best one that it overlaps, and lowers no other itself.
    """
    return scores * (1 - np.nan_to_num(_overlap_with_better(groups, boxes, scores, threshold, iou)))


def _overlap_with_better(
    groups: IntArray, boxes: FloatArray, scores: FloatArray, threshold: float, iou: Iou
) -> FloatArray:
    """Find the overlap of each dropped box with the kept one that drops it, [N]; NaN for boxes that are kept."""
    overlap = np.full(len(scores), np.nan)
    left = np.lexsort((-scores, groups))
    # A round keeps the best box of every group, so there are as many rounds as the fullest group keeps boxes.
    while len(left):
        head = np.ones(len(left), dtype=bool)
        head[1:] = groups[left[1:]] != groups[left[:-1]]
        best = left[head][np.cumsum(head) - 1]
        shared = iou(boxes[left], boxes[best])
        shared = shared.reshape(len(left), -1).mean(axis=1)
        dropped = ~head & (shared > threshold)
        overlap[left[dropped]] = shared[dropped]
        left = left[~head & ~dropped]
    return overlap


def best_of_groups(groups: IntArray, scores: FloatArray, count: int) -> BoolArray:
    """Mark the `count` best rows of each group, bool [N]; of equal scores the earlier."""
    order = np.lexsort((-scores, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    best = np.zeros(len(groups), dtype=bool)
    best[order[place < count]] = True
    return best
