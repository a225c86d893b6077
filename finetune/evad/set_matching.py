"""Which proposal answers for which annotated person: the cheapest assignment (systems/evad.md section 3, from DETR).

Shapes: B clips, P proposals of each, N persons in all, clip after clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.errors import RecipeError
from pretrain.models.evad.localisation import PERSON, clip_of, frame_scale
from pretrain.runtime.tensors import has_content

#: Weights of the cost, and of the losses of the same names.
PERSON_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0
#: In the place of a cost that is not finite; far above all that are, and still exact when a few are added.
NOT_FINITE = 1e6


@dataclass(frozen=True)
class AnnotatedPersons:
    """Annotated persons of a batch.

    Attributes:
        boxes: float32 [N, 4] in pixels.
        labels: float32 [N, K], 1 for each action.
        counts: int64 [B], persons of each clip.
        sizes: int64 [B, 2], height and width of frames before padding.
    """

    boxes: Tensor
    labels: Tensor
    counts: Tensor
    sizes: Tensor

    @property
    def clips(self) -> Tensor:
        """The clip of each person, int64 [N]."""
        total = len(self.boxes)
        if not has_content(self.counts):
            # A plan's clips have no persons to count: dealt out evenly.
            return clip_of(len(self.counts), -(-total // len(self.counts)), self.counts.device)[:total]
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(
            self.counts, output_size=total
        )


@dataclass(frozen=True)
class Matches:
    """Pairs of proposal and person of one localisation head, int64 [m]: clip, proposal in it, row of the person."""

    clips: Tensor
    proposals: Tensor
    persons: Tensor


def assignment_problems() -> list[str]:
    """Say what is missing for the assignment; nothing where it is there."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        return [f"objective.name=evad needs scipy ({error}): pip install 'tubelet[detection]'"]
    return []


@torch.no_grad()
def match_all(logits: Sequence[Tensor], boxes: Sequence[Tensor], persons: AnnotatedPersons) -> list[Matches]:
    """Match each localisation head's proposals with the persons of their clips, by the Hungarian algorithm.

    Args:
        logits: of each head, [B, P, 2].
        boxes: of each head, [B, P, 4] in pixels.
        persons: annotated. Of a clip with more than P of them P are matched.
    """
    clips = persons.clips
    costs = torch.stack([cost_of(*one, persons, clips) for one in zip(logits, boxes, strict=True)])
    if not has_content(costs):
        rows = torch.arange(len(clips), device=clips.device)
        return [Matches(clips, rows % boxes[0].shape[1], rows) for _ in costs]
    # One copy to the host for all heads: the device waits for it once.
    on_host, counts = costs.cpu().numpy(), persons.counts.tolist()
    pairs = [assign(one, counts) for one in on_host]
    return [Matches(clips[rows], columns, rows) for columns, rows in (_tensors(pair, clips.device) for pair in pairs)]


def cost_of(logits: Tensor, boxes: Tensor, persons: AnnotatedPersons, clips: Tensor) -> Tensor:
    """Compute the cost float32 [N, P] of each proposal of a person's own clip.

    2 x -p(person) + 5 x the distance of the corners as shares of the frame + 2 x -GIoU.
    """
    probability = logits.softmax(-1)[..., PERSON][clips]
    scale = frame_scale(persons.sizes)[clips][:, None]
    own, theirs = boxes[clips], persons.boxes[:, None]
    distance = (own / scale - theirs / scale).abs().sum(-1)
    overlap = giou_continuous(own, theirs.expand_as(own))
    return -PERSON_WEIGHT * probability + BOX_WEIGHT * distance - GIOU_WEIGHT * overlap


def assign(costs: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Assign proposals to persons of cost [N, P], clip by clip; gives proposals and persons, int64 [m] each."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise RecipeError(assignment_problems()) from error
    # Not raised here: a loss that is not finite is seen by all ranks, which leave the step out together.
    costs = np.nan_to_num(costs, nan=NOT_FINITE, posinf=NOT_FINITE, neginf=-NOT_FINITE)
    proposals, persons, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for count in counts:
        columns, rows = linear_sum_assignment(costs[first : first + count].T)
        proposals.append(columns)
        persons.append(rows + first)
        first += count
    return np.concatenate(proposals), np.concatenate(persons)


def giou_continuous(first: Tensor, second: Tensor) -> Tensor:
    """Compute the generalised IoU [...] of boxes [..., 4], pair by pair (Rezatofighi et al. 2019)."""
    start, end = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    common = (end - start).clamp(min=0).prod(-1)
    areas = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1)
    union = areas - common
    low, high = torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return common / union - (hull - union) / hull


def _tensors(pair: tuple[np.ndarray, np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(pair[0]).to(device), torch.from_numpy(pair[1]).to(device)
