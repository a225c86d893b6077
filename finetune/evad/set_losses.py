"""Losses of a set of predictions, each localisation head and decoder block by itself (systems/evad.md section 3)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.evad.set_matching import (
    BOX_WEIGHT,
    GIOU_WEIGHT,
    PERSON_WEIGHT,
    AnnotatedPersons,
    Matches,
    giou_continuous,
    match_all,
)
from pretrain.models.evad.context import ActorPredictions
from pretrain.models.evad.localisation import NOTHING, NOTHING_WEIGHT, PERSON, frame_scale


def set_losses(
    found: ActorPredictions, persons: AnnotatedPersons, expected: Tensor, action_weight: float
) -> dict[str, Tensor]:
    """Compute all weighted terms; the loss is their mean.

    Args:
        found: by the model.
        persons: annotated.
        expected: persons of the global batch divided by the ranks, at least 1; boxes' losses are divided by it.
        action_weight: of the actions' terms; the other weights are those of the matching.

    Returns:
        `loss_ce`, `loss_giou`, `loss_bbox` of each head and `loss_bce` of each block; the last one's without a number,
        those before it with theirs.
    """
    heads = match_all(found.person_logits, found.boxes, persons)
    terms: dict[str, Tensor] = {}
    for index, (logits, boxes, matches) in enumerate(zip(found.person_logits, found.boxes, heads, strict=True)):
        suffix = _suffix(index, len(heads))
        terms[f"loss_ce{suffix}"] = PERSON_WEIGHT * person_loss(logits, matches)
        distance, overlap = box_losses(boxes, persons, matches)
        terms[f"loss_giou{suffix}"] = GIOU_WEIGHT * overlap / expected
        terms[f"loss_bbox{suffix}"] = BOX_WEIGHT * distance / expected
    for index, logits in enumerate(found.action_logits):
        # With the last head's persons for every block, whose boxes they were all pooled from.
        loss = action_loss(logits, persons.labels, heads[-1])
        terms[f"loss_bce{_suffix(index, len(found.action_logits))}"] = action_weight * loss
    return terms


def _suffix(index: int, count: int) -> str:
    return "" if index == count - 1 else f"_{index}"


def mean_of_terms(terms: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """Average the terms, as the official trainer does: more heads make no larger gradient."""
    values = list(terms.values()) if isinstance(terms, Mapping) else list(terms)
    return torch.stack(values).mean()


def person_loss(logits: Tensor, matches: Matches) -> Tensor:
    """Weighted mean over proposals [B, P, 2] of the cross entropy: person where matched, else no object."""
    targets = torch.full(logits.shape[:2], NOTHING, device=logits.device)
    targets = targets.index_put((matches.clips, matches.proposals), targets.new_full((), PERSON))
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    weights = torch.where(targets.flatten() == PERSON, 1.0, NOTHING_WEIGHT)
    return (each * weights).sum() / weights.sum()


def box_losses(boxes: Tensor, persons: AnnotatedPersons, matches: Matches) -> tuple[Tensor, Tensor]:
    """Sum over matches the distance of corners, as shares of the frame, and 1 - GIoU; of boxes [B, P, 4]."""
    own, theirs = boxes[matches.clips, matches.proposals], persons.boxes[matches.persons]
    scale = frame_scale(persons.sizes)[matches.clips]
    return (own / scale - theirs / scale).abs().sum(), (1 - giou_continuous(own, theirs)).sum()


def action_loss(logits: Tensor, labels: Tensor, matches: Matches) -> Tensor:
    """Mean over matches and classes of the binary cross entropy of logits [B, P, K]; 0 where nobody is matched."""
    own = logits[matches.clips, matches.proposals]
    total = F.binary_cross_entropy_with_logits(own, labels[matches.persons], reduction="sum")
    return total / max(1, own.numel())
