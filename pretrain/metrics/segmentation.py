"""Scores of segmented pictures from a confusion matrix: what pixels are, and what they were taken for.

Matrices of batches, ranks and sources add up, so scores are those of all pixels together and not means over pictures
(ADE20K, Pascal VOC, Cityscapes). A class that is neither there nor predicted is in no mean, as in mmsegmentation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import DataError

#: Label of pixels that count nowhere, and prediction of pixels of which nothing is known.
NO_CLASS = -1


@dataclass(frozen=True)
class SegmentationScores:
    """Scores as shares from 0 to 1; NaN where there is nothing that they could be of.

    Attributes:
        iou: of each class, float64 [K]: pixels that are it and were found, divided by those that are it or were taken
            for it.
        accuracy: of each class, float64 [K]: share of its pixels that were found.
        mean_iou, mean_accuracy: means over classes; mIoU and mAcc.
        pixel_accuracy: share of all labelled pixels that were found; aAcc.
    """

    iou: Tensor
    accuracy: Tensor
    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float


def segmentation_confusion(truth: Tensor, found: Tensor, classes: int) -> Tensor:
    """Count pixels by class, int64 [K, K + 1]: rows what they are, columns what they were taken for.

    Args:
        truth: labels, integers of any shape; NO_CLASS: counts nowhere.
        found: predictions of the same shape; NO_CLASS: none, counted in the last column and so never right.
        classes: K.

    Raises:
        DataError: shapes differ, or labels that are no class.
    """
    if truth.shape != found.shape:
        raise DataError(f"segmentation: labels of shape {list(truth.shape)}, predictions of {list(found.shape)}")
    kept = truth != NO_CLASS
    rows, columns = truth[kept].long(), found[kept].long()
    for name, values in (("labels", rows), ("predictions", columns)):
        least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
        if not NO_CLASS <= least <= most < classes:
            allowed = f"0 to {classes - 1}, and {NO_CLASS}"
            raise DataError(f"segmentation: {name} from {least} to {most}; allowed: {allowed}")
    columns = torch.where(columns == NO_CLASS, classes, columns)
    counts = torch.bincount(rows * (classes + 1) + columns, minlength=classes * (classes + 1))
    return counts.view(classes, classes + 1)


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """Compute scores of a matrix [K, K + 1] of `segmentation_confusion`."""
    counts = confusion.double()
    right, there, taken = counts.diagonal(), counts.sum(1), counts[:, :-1].sum(0)
    iou, accuracy = right / (there + taken - right), right / there
    every = counts.sum()
    return SegmentationScores(
        iou, accuracy, float(iou.nanmean()), float(accuracy.nanmean()), float(right.sum() / every)
    )
