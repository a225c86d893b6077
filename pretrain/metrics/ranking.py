"""Ranks of the right class among all: what accuracies are counted from, for scores of any quality."""

import torch
from torch import Tensor

#: Answers among which the right one is looked for.
COUNTS = (1, 5)


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Count the classes that a model puts before the right one, int64 [n].

    Scores that are not finite are never right: NaN compares as false with everything, so that a broken network would
    be right about every sample.

    Args:
        scores: of each class, float [n, K].
        targets: the right classes, int64 [n].
    """
    right = scores.gather(1, targets[:, None])
    # Not `>`: a class with NaN counts as put before the right one.
    above = (~(scores <= right)).sum(dim=1)
    # A model that gives all classes the same would be always right if ties counted for it, never if against.
    equal = (scores == right).sum(dim=1) - 1
    return torch.where(right[:, 0].isfinite(), above + equal.clamp(min=0) // 2, scores.shape[1])


def accuracy(scores: Tensor, targets: Tensor, k: int = 1) -> float:
    """Compute top-k accuracy in percent."""
    return 100 * (ranks(scores, targets) < k).float().mean().item()


def accuracies(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy in percent by name, top-5 where there are five classes or more.

    Of fewer every answer would be right, and a table would show 100 % that nobody has earned.
    """
    return {f"top{k}": accuracy(scores, targets, k) for k in counts_of(scores.shape[1])}


def counts_of(classes: int) -> list[int]:
    """Tell of how many answers the accuracy of so many classes is measured."""
    return [k for k in COUNTS if k <= max(classes, 1)]


def predicted(scores: Tensor) -> Tensor:
    """Pick the class of the highest score, int64 [n]; -1 where a score is NaN."""
    return torch.where(scores.isnan().any(dim=1), -1, scores.argmax(dim=1))
