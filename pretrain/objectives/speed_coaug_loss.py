"""Losses of speed co-augmentation: pairs of what is seen and heard at one of two speeds, and soft ones across speeds.

Source: systems/speed_coaug.md, section 4. Rows: B of this rank, N of all ranks in the order of positions; with two
views the rows of a file's two speeds are neighbours.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.objectives.contrast import Form, both_directions, info_nce, normalized, same_group
from pretrain.runtime.collectives import gather, gather_with_gradient, own_rows
from pretrain.runtime.process_group import Ranks

#: Names of embeddings: what is seen and heard, what the affinity compares, and the numbers beside them.
SEEN, HEARD, SEEN_KEY, HEARD_KEY, FILE, SPEED = "seen", "heard", "seen_key", "heard_key", "file", "speed"


@dataclass
class SoftTarget:
    """Weight of the other speed's row of the same file as a positive."""

    kind: Literal["affinity", "affinity_queue", "schedule", "const"] = "affinity"
    """affinity: learned attention of the anchor to both speeds; affinity_queue: instead the nearest of earlier files
    are soft positives (SNCLR across modalities); schedule: slower speed / faster speed; const: alpha"""
    dim: int = 128
    """affinity: channels that anchor and candidates are compared in"""
    gain: float = 1.0
    """affinity: factor on their cosine"""
    detach: bool = False
    """affinity: no gradient through the weights"""
    alpha: float = 0.5
    """const: the weight"""
    neighbours: int = 5
    """affinity_queue: soft positives of a row"""
    queue: int = 4096
    """affinity_queue: embeddings of each kind that are kept, the same on all ranks"""


@dataclass
class PairLoss:
    """Contrast of rows with the sound of their own time and speed."""

    kind: Literal["info_nce", "soft_info_nce"] = "soft_info_nce"
    """info_nce: one positive; soft_info_nce: soft ones beside it, which stay in the softmax"""
    form: Form = "sum_of_logs"
    """soft_info_nce: -(log P + w log P'), SNCLR's code; or log_of_sum, -log(P + w P'), its paper. Not equal for w
    between 0 and 1: name it with every result"""
    same_file: Literal["ignore", "negative"] = "ignore"
    """info_nce: whether the other speed of the same file is left out, or a negative"""
    mask_same_file: bool = True
    """leave other samples of the same file out of the negatives"""
    temperature: float = 0.07
    """divides cosines"""
    learnable: bool = False
    """learn the temperature, which only begins there; its inverse counts as at most 100"""
    scale_2tau: bool = False
    """multiply the loss by twice the temperature (SNCLR)"""
    within: float = 0.0
    """coefficient of the contrast of both speeds within each modality (AVID: 0)"""
    chunk: int | None = None
    """rows of logits that stand in memory at once; null: all"""
    soft: SoftTarget = field(default_factory=SoftTarget)
    """weights of soft_info_nce"""

    @property
    def attends(self) -> bool:
        """Whether weights come of learned maps."""
        return self.kind == "soft_info_nce" and self.soft.kind == "affinity"

    @property
    def queues(self) -> bool:
        """Whether soft positives come from queues."""
        return self.kind == "soft_info_nce" and self.soft.kind == "affinity_queue"

    def problems(self, key: str, views: int) -> list[str]:
        """Say what can't work with so many speeds; `key` is the name of this section."""
        soft = self.soft
        found = []
        if not 0 < self.temperature < math.inf:
            found.append(f"{key}.temperature: found {self.temperature:g}, allowed: more than 0")
        if self.chunk is not None and self.chunk < 1:
            found.append(f"{key}.chunk: found {self.chunk}, allowed: more than 0, or null")
        if self.within < 0:
            found.append(f"{key}.within: found {self.within:g}, allowed: 0 or more")
        if not 0 <= soft.alpha <= 1:
            found.append(f"{key}.soft.alpha: found {soft.alpha:g}, allowed: from 0 to 1")
        if min(soft.dim, soft.neighbours) < 1 or soft.queue < soft.neighbours:
            sizes = f"dim={soft.dim}, neighbours={soft.neighbours}, queue={soft.queue}"
            found.append(f"{key}.soft: found {sizes}; allowed: from 1, and a queue of at least so many neighbours")
        if views == 1 and self.kind == "soft_info_nce" and not self.queues:
            found.append(f"{key}.kind=soft_info_nce: needs the other speed, input.views=2; or soft.kind=affinity_queue")
        if views == 1 and self.within > 0:
            found.append(f"{key}.within={self.within:g}: compares both speeds, needs input.views=2")
        return found


class PairAffinity(nn.Module):
    """Learned maps of both encoders' vectors into one space, unit length: `fv` and `fa` of the published layout."""

    def __init__(self, seen: int, heard: int, dim: int) -> None:
        super().__init__()
        self.fv, self.fa = nn.Linear(seen, dim, bias=False), nn.Linear(heard, dim, bias=False)

    def forward(self, seen: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
        """Map vectors [B, C] to keys float32 [B, dim]."""
        return normalized(self.fv(seen)), normalized(self.fa(heard))


class PairTerms(NamedTuple):
    """Losses of a rank's rows [B], from either side, and the weights of soft positives [B, K]; None: there are none."""

    of_seen: Tensor
    of_heard: Tensor
    weights: tuple[Tensor, Tensor] | None


def affinity_weights(seen: Tensor, heard: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """Compute how much of its attention an anchor gives to the other speed: a softmax over the file's two.

    Args:
        seen, heard: keys [B, D], neighbours are a file's two speeds.
        gain: factor on products.

    Returns:
        [B, 1] of anchors that are seen, and of those that are heard.
    """
    products = gain * torch.einsum("nrd,nqd->nrq", seen.unflatten(0, (-1, 2)), heard.unflatten(0, (-1, 2)))
    own, other = products.diagonal(dim1=1, dim2=2), products.flip(2).diagonal(dim1=1, dim2=2)
    of_seen, of_heard = torch.sigmoid(other - own), torch.sigmoid(other.flip(1) - own)
    return of_seen.reshape(-1, 1), of_heard.reshape(-1, 1)


def schedule_weights(speeds: Tensor) -> tuple[Tensor, Tensor]:
    """Compute slower / faster speed of an anchor and the other row of its file, for both sides; speeds [B, 2]."""
    seen, heard = speeds.unflatten(0, (-1, 2)).unbind(2)

    def ratio(anchor: Tensor, other: Tensor) -> Tensor:
        return (torch.minimum(anchor, other) / torch.maximum(anchor, other)).reshape(-1, 1)

    return ratio(seen, heard.flip(1)), ratio(heard, seen.flip(1))


def soft_weights(embeddings: dict[str, Tensor], options: SoftTarget) -> tuple[Tensor, Tensor]:
    """Compute the weights [B, 1] of the other speed for anchors of both sides."""
    if options.kind == "affinity":
        found = affinity_weights(embeddings[SEEN_KEY], embeddings[HEARD_KEY], options.gain)
        return (found[0].detach(), found[1].detach()) if options.detach else found
    if options.kind == "schedule":
        return schedule_weights(embeddings[SPEED])
    fixed = torch.full_like(embeddings[SPEED][:, :1], options.alpha)
    return fixed, fixed


def left_out(files: Tensor, options: PairLoss, ranks: Ranks, views: int) -> Tensor:
    """Tell which rows of all ranks are no candidates of an own row, bool [B, N]."""
    same = same_group(files, ranks, views)
    if not options.mask_same_file:
        same = torch.zeros_like(same)
    if views == 1:
        return same
    # Whatever the mask of files says: the other speed of the same sample is the loss's own affair.
    other = own_rows(len(files), ranks, views) ^ 1
    ignored = options.kind == "info_nce" and options.same_file == "ignore"
    return same.scatter(1, other[:, None], ignored)


def pair_terms(
    embeddings: dict[str, Tensor], options: PairLoss, scale: Tensor | float, ranks: Ranks, views: int
) -> PairTerms:
    """Compute both directions' losses over the global batch, where soft positives are rows of it or there are none.

    Args:
        embeddings: of this rank's rows, by name: `seen`, `heard` unit length [B, D], `file`, `speed`, and keys.
        options: of the loss.
        scale: 1 / temperature.
        ranks: this process among all.
        views: speeds of a file.
    """
    soft, weights = None, None
    if options.kind == "soft_info_nce":
        soft = (own_rows(len(embeddings[SEEN]), ranks, views) ^ 1)[:, None]
        weights = soft_weights(embeddings, options.soft)
    of_seen, of_heard = both_directions(
        embeddings[SEEN], embeddings[HEARD], scale, ranks, views=views, soft=soft, weights=weights, form=options.form,
        excluded=left_out(embeddings[FILE], options, ranks, views), chunk=options.chunk,
    )  # fmt: skip
    return PairTerms(of_seen, of_heard, weights)


def queue_terms(
    embeddings: dict[str, Tensor],
    queues: tuple[Tensor, Tensor],
    options: PairLoss,
    scale: Tensor | float,
    ranks: Ranks,
    views: int,
) -> PairTerms:
    """Compute both directions' losses with earlier files as soft positives, the nearest to each row's own positive.

    The neighbours of all rows are candidates of every anchor, as in SNCLR (systems/snclr.md, 3.1).

    Args:
        queues: unit embeddings [S, D] of what was seen and of what was heard.
    """
    seen, heard = embeddings[SEEN], embeddings[HEARD]
    excluded = left_out(embeddings[FILE], options, ranks, views)
    positives = own_rows(len(seen), ranks, views)

    def losses(anchors: Tensor, others: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        nearest = (others.detach() @ queue.t()).topk(options.soft.neighbours, dim=1).indices
        neighbours = queue[nearest]  # [B, K, D]
        weights = torch.einsum("bd,bkd->bk", anchors, neighbours).softmax(1)
        weights = weights.detach() if options.soft.detach else weights
        rows = gather_with_gradient(others, ranks, views)
        candidates = torch.cat((rows, gather(neighbours, ranks, views).flatten(0, 1)))
        soft = len(rows) + positives[:, None] * options.soft.neighbours + torch.arange(
            options.soft.neighbours, device=anchors.device
        )  # fmt: skip
        mask = torch.cat((excluded, excluded.new_zeros(len(anchors), len(candidates) - len(rows))), dim=1)
        loss = info_nce(anchors, candidates, positives, 1 / scale, soft=soft, weights=weights, form=options.form,
                        excluded=mask, chunk=options.chunk)  # fmt: skip
        return loss, weights

    (of_seen, seen_weights), (of_heard, heard_weights) = losses(seen, heard, queues[1]), losses(heard, seen, queues[0])
    return PairTerms(of_seen, of_heard, (seen_weights, heard_weights))


def within_loss(embeddings: dict[str, Tensor], options: PairLoss, scale: Tensor | float, ranks: Ranks) -> Tensor:
    """Compute the contrast of a file's two speeds within each modality, a scalar."""
    files = embeddings[FILE][::2]
    excluded = same_group(files, ranks) if options.mask_same_file else None
    sides = [
        both_directions(rows[::2], rows[1::2], scale, ranks, excluded=excluded, chunk=options.chunk)
        for rows in (embeddings[SEEN], embeddings[HEARD])
    ]
    return torch.stack([loss.mean() for pair in sides for loss in pair]).sum() / 2
