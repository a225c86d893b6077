"""Contrast of embeddings, for every method that compares: InfoNCE, with soft positives and without some columns.

Sources: systems/snclr.md and tagalign.md, section 3; systems/speed_coaug.md and tvtsv2.md, section 4. Functions of
tensors alone, in float32 at least, also where a step runs in half precision. Shapes: B anchors of this rank, N
candidates, D channels, K soft positives of each anchor.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.data.randomness import key_of
from pretrain.data.samples import Batch
from pretrain.errors import TrainingError
from pretrain.runtime.collectives import Gradient, gather, gather_with_gradient, own_rows
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.tensors import sum_type

#: How soft positives enter: sum of logs, SNCLR's code; log of the sum, as printed in its paper.
Form = Literal["sum_of_logs", "log_of_sum"]
#: Largest exponent of a soft positive without weight, beside those that have one: beyond, float32 would be infinite.
LARGEST_EXPONENT = 80.0


def normalized(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Divide embeddings [..., D] by their length, at least `eps` (TVTSv2: 1e-8, TagAlign: 1e-6); float32 at least."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.to(sum_type(x)), dim=-1, eps=eps)


class LogitScale(nn.Module):
    """Learnable factor on similarities, CLIP's: the inverse of a temperature, kept as its logarithm.

    The parameter `logit_scale` has one value, [1], so that it does not decay unless an objective's `rule` says so. A
    factor above the limit is used as the limit, and gets no gradient there.

    Args:
        temperature: at the start.
        limit: of the factor.
    """

    def __init__(self, temperature: float = 0.07, limit: float = 100.0) -> None:
        super().__init__()
        self.limit = limit
        # Not without dimensions: without ZeRO DeepSpeed 0.19 can't sum such a gradient over ranks, and plans refuse it.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    def forward(self) -> Tensor:
        """Return the factor, float32, a scalar."""
        return self.logit_scale.float().exp().clamp(max=self.limit).squeeze(0)


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    temperature: Tensor | float,
    *,
    soft: Tensor | None = None,
    weights: Tensor | None = None,
    form: Form = "sum_of_logs",
    excluded: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute InfoNCE of each anchor: minus the logarithm of its positive's share in the softmax over candidates.

    With P that share of each column and weights w, `sum_of_logs` is -(log P(positive) + sum_k w_k log P(soft_k)),
    `log_of_sum` is -log(P(positive) + sum_k w_k P(soft_k)). Gradients flow to everything but column numbers.

    Args:
        anchors: [B, D], `normalized` where similarities are cosines.
        candidates: [N, D].
        positives: column of each anchor's positive, int64 [B].
        temperature: divides similarities; above 0. A factor's inverse, where it is a `LogitScale`.
        soft: columns of soft positives, int64 [B, K]; they stay in the softmax.
        weights: of the soft positives [B, K], 0 or more.
        form: of the loss with soft positives.
        excluded: columns that are no candidates of an anchor, bool [B, N]; positives and soft positives count all the
            same, so that a mask of all rows of the same file may be handed over as it is.
        chunk: rows of logits that stand in memory at once, computed again in the backward pass; None: all, kept for it.
            The values are the same.

    Returns:
        [B].

    Raises:
        TrainingError: shapes that don't fit, an unknown form, a temperature or chunk that is not above 0.
    """
    _check(anchors, candidates, positives, soft, weights, excluded)
    if form not in get_args(Form):
        raise TrainingError(f"info_nce: found form={form!r}, allowed: {', '.join(get_args(Form))}")
    columns = positives[:, None] if soft is None else torch.cat((positives[:, None], soft), dim=1)
    shares = log_shares(anchors, candidates, columns, temperature, excluded=excluded, chunk=chunk)
    if weights is None:
        return -shares[:, 0]
    weights = weights.to(shares.dtype)
    if form == "sum_of_logs":
        return -(shares[:, 0] + (weights * shares[:, 1:]).sum(1))
    return -_log_of_sum(shares, weights)


def log_shares(
    anchors: Tensor,
    candidates: Tensor,
    columns: Tensor,
    temperature: Tensor | float,
    *,
    excluded: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Compute the log-softmax over candidates at some columns of each anchor; arguments as for `info_nce`.

    Args:
        columns: int64 [B, M].

    Returns:
        [B, M].
    """
    for name, value in (("temperature", temperature), ("chunk", 1 if chunk is None else chunk)):
        # A tensor's value is not asked for: the step would wait for the device.
        if not isinstance(value, Tensor) and not 0 < value < math.inf:
            raise TrainingError(f"info_nce: found {name}={value}, allowed: above 0")
    with torch.autocast(anchors.device.type, enabled=False):
        # Divided here and not in the logits: the gradient of a temperature then needs no matrix of its own.
        scaled = anchors.to(sum_type(anchors)) / temperature
        candidates = candidates.to(sum_type(candidates))
        if chunk is not None and chunk < len(anchors):
            found: Tensor = _ChunkedShares.apply(scaled, candidates, columns, excluded, chunk)
            return found
        return _logits(scaled, candidates, columns, excluded).log_softmax(1).gather(1, columns)


def both_directions(
    first: Tensor,
    second: Tensor,
    scale: Tensor | float,
    ranks: Ranks,
    gradient: Gradient = "sum",
    *,
    views: int = 1,
    excluded: Tensor | None = None,
    soft: Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    form: Form = "sum_of_logs",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Contrast pairs over the global batch: each row of one side with all rows of the other, in both directions.

    The mean over own rows is this rank's loss; callers add or average the directions. Loss and gradients are then those
    of one rank that has all rows.

    Args:
        first, second: this rank's rows [B, D], pairs in the same row; `normalized` where similarities are cosines.
        scale: factor on similarities, 1 / temperature.
        ranks: this process among all.
        gradient: "sum": as one rank; "official": as code whose gather keeps the own slice alone (TVTSv2), where the
            gradient of the embeddings, but not of `scale` and weights, is 1 / world_size of that.
        views: neighbouring rows that belong to one sample.
        excluded: rows of all ranks that are no candidates of an own row, bool [B, N] (`same_group`); the own pair is.
        soft: rows of all ranks that are soft positives of an own row, int64 [B, K].
        weights: theirs [B, K], for anchors of the first side and of the second.
        form, chunk: as for `info_nce`.

    Returns:
        Losses [B] of anchors of the first side, and of the second.
    """
    if first.shape != second.shape:
        raise TrainingError(
            f"both_directions: found {list(first.shape)} and {list(second.shape)}, allowed: pairs, [B, D] on both sides"
        )
    if gradient == "official":
        first, second = _divided_gradient(first, ranks), _divided_gradient(second, ranks)
    elif gradient != "sum":
        raise TrainingError(f"both_directions: found gradient={gradient!r}, allowed: {', '.join(get_args(Gradient))}")
    positives = own_rows(len(first), ranks, views)
    of_first, of_second = (None, None) if weights is None else weights

    def losses(anchors: Tensor, others: Tensor, own_weights: Tensor | None) -> Tensor:
        candidates = gather_with_gradient(others, ranks, views)
        return info_nce(
            anchors,
            candidates,
            positives,
            1 / scale,
            soft=soft,
            weights=own_weights,
            form=form,
            excluded=excluded,
            chunk=chunk,
        )

    return losses(first, second, of_first), losses(second, first, of_second)


def same_group(groups: Tensor, ranks: Ranks, views: int = 1) -> Tensor:
    """Tell which rows of all ranks belong to an own row's group, bool [B, N].

    Args:
        groups: numbers of this rank's rows, int64 [B]; `file_numbers`, for example.
        ranks: this process among all.
        views: neighbouring rows that belong to one sample.
    """
    return groups[:, None] == gather(groups, ranks, views)[None]


def file_numbers(batch: Batch) -> Tensor:
    """Give one number to all rows of a batch that were made of the same sample of the data, int64 [B].

    The same on all ranks and in all batches: where sources are weighted, a step may hold a file more than once.
    """
    source = batch["source"]
    pairs = zip(source.tolist(), batch["key"], strict=True)
    # 63 bits: int64 has no more, and torch no larger type that collectives carry.
    return torch.tensor([key_of(*pair) & (1 << 63) - 1 for pair in pairs], device=source.device)


class _ChunkedShares(torch.autograd.Function):
    """`log_shares` of which only `chunk` rows of logits exist at a time; of the forward pass only sums are kept."""

    @staticmethod
    def forward(
        ctx: Any, scaled: Tensor, candidates: Tensor, columns: Tensor, excluded: Tensor | None, chunk: int
    ) -> Tensor:
        shares, totals = [], []
        for part in _parts(len(scaled), chunk):
            logits = _logits(scaled[part], candidates, columns[part], _rows(excluded, part))
            totals.append(logits.logsumexp(1, keepdim=True))
            shares.append(logits.gather(1, columns[part]) - totals[-1])
        ctx.save_for_backward(scaled, candidates, columns, torch.cat(totals))
        ctx.excluded, ctx.chunk = excluded, chunk
        return torch.cat(shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        scaled, candidates, columns, totals = ctx.saved_tensors
        of_scaled, of_candidates = torch.empty_like(scaled), torch.zeros_like(candidates)
        with torch.autocast(scaled.device.type, enabled=False):
            for part in _parts(len(scaled), ctx.chunk):
                own, places, gradient = scaled[part], columns[part], gradients[0][part]
                # In place: softmax, then the gradient of the logits, in the memory of the logits.
                logits = _logits(own, candidates, places, _rows(ctx.excluded, part)).sub_(totals[part]).exp_()
                logits.mul_(-gradient.sum(1, keepdim=True)).scatter_add_(1, places, gradient)
                of_scaled[part] = logits @ candidates
                of_candidates.addmm_(logits.T, own)
        return of_scaled, of_candidates, None, None, None


def _logits(scaled: Tensor, candidates: Tensor, columns: Tensor, excluded: Tensor | None) -> Tensor:
    logits = scaled @ candidates.T
    # What is asked for is a candidate in any case.
    return logits if excluded is None else logits.masked_fill_(excluded.scatter(1, columns, False), -math.inf)


def _parts(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _rows(mask: Tensor | None, part: slice) -> Tensor | None:
    return None if mask is None else mask[part]


def _log_of_sum(shares: Tensor, weights: Tensor) -> Tensor:
    """Compute log(P_0 + sum_k w_k P_k) of log P [B, 1+K], stable, with the gradient of weights that are 0."""
    weights = torch.cat((torch.ones_like(shares[:, :1]), weights), dim=1)
    # The largest that counts: one without weight could be so much larger that all others would vanish beside it.
    largest = shares.detach().masked_fill(weights == 0, -math.inf).amax(1, keepdim=True)
    # Not log w + log P: its gradient is infinity times 0 where w is 0.
    terms = weights * (shares - largest).clamp(max=LARGEST_EXPONENT).exp()
    return terms.sum(1).log() + largest[:, 0]


def _divided_gradient(x: Tensor, ranks: Ranks) -> Tensor:
    if ranks.world_size == 1 or not x.requires_grad:
        return x
    # A view of its own: a hook on the caller's tensor would divide the gradients of its other uses as well.
    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient / ranks.world_size)
    return x


def _check(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    soft: Tensor | None,
    weights: Tensor | None,
    excluded: Tensor | None,
) -> None:
    if (soft is None) != (weights is None):
        missing = "weights" if weights is None else "soft"
        raise TrainingError(f"info_nce: {missing} missing; columns of soft positives and their weights come together")
    rows = (len(anchors),)
    kinds = len(soft[0]) if soft is not None and soft.dim() == 2 and len(soft) else 0
    wanted = {
        "candidates": (candidates, (len(candidates), anchors.shape[-1])),
        "positives": (positives, rows),
        "soft": (soft, (*rows, kinds)),
        "weights": (weights, (*rows, kinds)),
        "excluded": (excluded, (*rows, len(candidates))),
    }
    for name, (value, shape) in wanted.items():
        if value is not None and tuple(value.shape) != shape:
            raise TrainingError(
                f"info_nce: found {name} of shape {list(value.shape)} beside anchors of shape {list(anchors.shape)} "
                f"and {len(candidates)} candidates, allowed: {list(shape)}"
            )
