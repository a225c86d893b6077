"""Area under the curve of precision over recall, in the ways that published numbers of detection use."""

import numpy as np

from pretrain.metrics.overlap import BoolArray, FloatArray


def envelope_area(hits: BoolArray, truths: int) -> float:
    """Area under the highest precision at this recall or above, at every recall reached (VOC 2010, ActivityNet).

    Args:
        hits: whether each detection is right, by falling score, bool [n].
        truths: what there is to find, more than 0.

    Source: systems/action_detection.md section 4; `compute_average_precision` of ActivityNet's `metrics.py`.
    """
    precision, recall = _curve(hits, truths)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * best).sum())


def trapezoid_area(hits: BoolArray, truths: int) -> float:
    """Area under straight lines from (precision 1, recall 0) through every detection (ACT).

    Arguments as `envelope_area`. Source: systems/action_detection.md section 5.2; `pr_to_ap` of ACT.
    """
    precision, recall = _curve(hits, truths)
    before = np.concatenate(([1.0], precision[:-1]))
    return float((np.diff(recall, prepend=0.0) * (precision + before) / 2).sum())


def sampled_area(hits: BoolArray, truths: int) -> float:
    """Mean of the highest precision at recalls of 0, 0.01, ... 1 or above (COCO).

    Arguments as `envelope_area`. Source: `accumulate` of pycocotools' `COCOeval`.
    """
    precision, recall = _curve(hits, truths)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return float(np.append(best, 0.0)[places].mean())


def _curve(hits: BoolArray, truths: int) -> tuple[FloatArray, FloatArray]:
    """Compute precision and recall [n] among the first 1, 2, ... n detections."""
    found = np.cumsum(hits, dtype=np.float64)
    return found / np.arange(1, len(hits) + 1), found / truths
