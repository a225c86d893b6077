"""Losses of persons' actions, all sums over boxes: a step with more persons weighs more, as officially.

Officially a loss is the mean over the boxes of a GPU times their number (systems/action_detection.md section 6).
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

#: Names that a recipe knows.
LossName = Literal["bce", "softmax", "focal"]
#: AVA's first outputs, of which a person has one: poses, then what is done with objects and with persons.
POSES, OBJECTS, PERSONS = 14, 49, 17
#: AlphAction's weights of the three.
GROUP_WEIGHTS = (1.2, 49.0, 17.0)


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over boxes [n, K] of the mean binary cross entropy over classes; 0 without boxes."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / logits.shape[1]


def softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over boxes [n, K] of the cross entropy with their one label (UCF101-24, JHMDB); of several labels the first
    counts, and boxes without any don't count."""
    each = F.cross_entropy(logits, labels.argmax(1), reduction="none")
    return (each * (labels.amax(1) > 0)).sum()


def focal_softmax_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Sum over boxes [n, K] of (1 - p)^gamma times the cross entropy with the first of their labels.

    Boxes without a label in this group count as of its first class, as officially (systems/cycleacr.md section 4).
    """
    log_probability = F.log_softmax(logits, dim=1).gather(1, labels.argmax(1, keepdim=True))
    return (-((1 - log_probability.exp()) ** gamma) * log_probability).sum()


def focal_binary_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Sum over boxes [n, K] of the mean over classes of (1 - p)^gamma times the binary cross entropy; no alpha."""
    errors = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    probability = logits.sigmoid()
    right = probability * labels + (1 - probability) * (1 - labels)
    return ((1 - right) ** gamma * errors).mean(1).sum()


def grouped_focal_loss(
    logits: Tensor, labels: Tensor, groups: Sequence[int] = (POSES, OBJECTS, PERSONS),
    weights: Sequence[float] = GROUP_WEIGHTS,
) -> Tensor:  # fmt: skip
    """Weighted sum of focal softmax over the first group of classes, and focal sigmoid over each other one.

    Args:
        logits: [n, K].
        labels: [n, K] of 0 and 1.
        groups: classes in each group, in the order of outputs; they add up to K.
        weights: of each group.
    """
    parts = list(zip(logits.split(list(groups), 1), labels.split(list(groups), 1), weights, strict=True))
    pose = parts[0][2] * focal_softmax_loss(*parts[0][:2])
    return sum((weight * focal_binary_loss(one, own) for one, own, weight in parts[1:]), pose)
