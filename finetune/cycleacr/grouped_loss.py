"""AlphAction's loss of AVA's three groups of actions, as means over boxes (systems/cycleacr.md, 4)."""

from typing import NamedTuple

import torch
from torch import Tensor

from finetune.detection.losses import (
    GROUP_WEIGHTS,
    OBJECTS,
    PERSONS,
    POSES,
    focal_binary_loss,
    focal_softmax_loss,
)

#: Groups by name, in the order of outputs.
GROUPS = {"pose": POSES, "object": OBJECTS, "person": PERSONS}


class GroupedLoss(NamedTuple):
    """`total`, weighted, and each group's own `losses` and `accuracies`, by its name."""

    total: Tensor
    losses: dict[str, Tensor]
    accuracies: dict[str, Tensor]


def grouped_loss(logits: Tensor, labels: Tensor, boxes: Tensor) -> GroupedLoss:
    """Compute the losses of logits [n, 80] and labels [n, 80].

    Args:
        logits: of all outputs.
        labels: 0 and 1.
        boxes: what sums over boxes are divided by: their number, averaged over ranks.
    """
    sizes = list(GROUPS.values())
    parts = dict(zip(GROUPS, zip(logits.split(sizes, 1), labels.split(sizes, 1), strict=True), strict=True))
    losses, accuracies = {}, {}
    for name, (found, wanted) in parts.items():
        loss = focal_softmax_loss if name == "pose" else focal_binary_loss
        losses[name] = loss(found, wanted) / boxes
        right = pose_right(found, wanted) if name == "pose" else set_overlap(found, wanted)
        accuracies[name] = right.sum() / boxes
    weighted = [weight * loss for weight, loss in zip(GROUP_WEIGHTS, losses.values(), strict=True)]
    return GroupedLoss(torch.stack(weighted).sum(), losses, accuracies)


def pose_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Tell of each box whether the likeliest pose is its first one, float32 [n]."""
    return (logits.argmax(1) == labels.argmax(1)).float()


def set_overlap(logits: Tensor, labels: Tensor) -> Tensor:
    """Divide of each box the actions both found and true by those found or true; 1 where there are none. Float [n]."""
    found, wanted = logits > 0, labels > 0
    both, either = ((found & wanted).sum(1).float(), (found | wanted).sum(1).float())
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both))
