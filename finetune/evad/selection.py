"""Which proposals are a detector's answer (systems/evad.md section 5)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.models.evad.context import ActorPredictions
from pretrain.models.evad.localisation import PERSON, frame_scale


@dataclass(frozen=True)
class SelectedPersons:
    """Persons found, clip after clip.

    Attributes:
        boxes: float32 [n, 4] in pixels, inside the frames.
        scores: float32 [n, K], probabilities of the actions; that of being a person is not in them.
        counts: persons of each clip.
    """

    boxes: Tensor
    scores: Tensor
    counts: list[int]


def select_persons(found: ActorPredictions, sizes: Tensor, threshold: float, empty: bool = False) -> SelectedPersons:
    """Take the proposals that are persons with this probability or more; of a clip without any, all of them.

    Args:
        found: by the model; the last head's and the last block's answers count.
        sizes: height and width of frames before padding, int64 [B, 2].
        threshold: probability.
        empty: of a clip without any, none.
    """
    chosen = person_scores(found) >= threshold
    if not empty:
        # Officially so: a keyframe is never without an answer, and a wrong one costs less than a missing person.
        chosen = chosen | ~chosen.any(dim=1, keepdim=True)
    boxes, scores = clipped_boxes(found, sizes), found.action_logits[-1].sigmoid()
    return SelectedPersons(boxes[chosen], scores[chosen], chosen.sum(1).tolist())


def person_scores(found: ActorPredictions) -> Tensor:
    """Give the probability [B, P] that a proposal is a person."""
    return found.person_logits[-1].softmax(-1)[..., PERSON]


def clipped_boxes(found: ActorPredictions, sizes: Tensor) -> Tensor:
    """Give all boxes [B, P, 4], cut to the last pixels of their frames before padding."""
    last = frame_scale(sizes)[:, None] - 1
    return torch.minimum(found.boxes[-1].clamp(min=0), last)
