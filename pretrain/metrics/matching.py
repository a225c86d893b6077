"""Which detection finds which true box or tube: detections come in a given order, and each is found once.

All frames and classes are matched at once: a *group* is a code of frame and class, and detections meet truth inside it.
"""

import numpy as np

from pretrain.metrics.overlap import BoolArray, FloatArray, IntArray, Iou


def pairs(rows: IntArray, others: IntArray) -> tuple[IntArray, IntArray]:
    """List all pairs of equal groups.

    Args:
        rows: groups, int64 [n].
        others: groups, int64 [m].

    Returns:
        Positions in `rows` and in `others`, int64 [pairs] each, by rising position in `rows`, then in `others`.
    """
    order = np.argsort(others, kind="stable")
    first = np.searchsorted(others[order], rows, "left")
    count = np.searchsorted(others[order], rows, "right") - first
    row = np.repeat(np.arange(len(rows)), count)
    step = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return row, order[np.repeat(first, count) + step]


class Matching:
    """Overlaps of detections with what they may find; asked for hits at any threshold.

    Args:
        detections: how many there are, n; numbered in the order in which they are matched.
        rows: detection of each pair, int64 [pairs], rising.
        truths: what it may find, int64 [pairs].
        overlaps: IoU of each pair [pairs].
    """

    def __init__(self, detections: int, rows: IntArray, truths: IntArray, overlaps: FloatArray) -> None:
        self.detections, self.rows, self.truths, self.overlaps = detections, rows, truths, overlaps

    @classmethod
    def of_boxes(
        cls, groups: IntArray, boxes: FloatArray, true_groups: IntArray, true_boxes: FloatArray, iou: Iou
    ) -> "Matching":
        """Compare boxes xyxy [n, 4] of groups [n], in the order of matching, with true boxes [m, 4] of groups [m]."""
        rows, truths = pairs(groups, true_groups)
        return cls(len(groups), rows, truths, iou(boxes[rows], true_boxes[truths]))

    def hits_by_best(self, threshold: float) -> BoolArray:
        """Find detections whose best truth overlaps enough and is not found before, bool [n] (ActivityNet, VOC).

        The best one is chosen first, the first of equals, and the threshold and whether it is taken are looked at
        after: a detection whose best truth is taken is wrong, even where a free one overlaps enough as well.
        """
        hits = np.zeros(self.detections, dtype=bool)
        if not len(self.rows):
            return hits
        starts = np.flatnonzero(np.diff(self.rows, prepend=-1))
        highest = np.maximum.reduceat(self.overlaps, starts)
        best = np.flatnonzero(self.overlaps == np.repeat(highest, np.diff(starts, append=len(self.rows))))
        best = best[np.flatnonzero(np.diff(self.rows[best], prepend=-1))]
        enough = best[self.overlaps[best] >= threshold]
        _, earliest = np.unique(self.truths[enough], return_index=True)
        hits[self.rows[enough[earliest]]] = True
        return hits

    def hits_by_free(self, threshold: float) -> BoolArray:
        """Find detections that overlap enough with a truth not found before, bool [n]: the best is taken (ACT)."""
        hits = np.zeros(self.detections, dtype=bool)
        enough = np.flatnonzero(self.overlaps >= threshold)
        # By row, then falling overlap; equal ones as the truth stands. What is left is short: a row or two a box.
        order = enough[np.lexsort((-self.overlaps[enough], self.rows[enough]))]
        taken: set[int] = set()
        found = -1
        for row, truth in zip(self.rows[order].tolist(), self.truths[order].tolist(), strict=True):
            if row != found and truth not in taken:
                taken.add(truth)
                found = row
                hits[row] = True
        return hits
