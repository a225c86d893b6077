"""Tensors and numbers of all ranks, with and without gradient, in the order of positions.

The order is that of `pretrain.data.stream_plan`: neighbouring positions lie on neighbouring ranks, so row `slot` of
rank r is row `slot * world_size + r` of the global batch, for any number of ranks. Micro-batches of a step put together
in their order keep to it.

The gradients follow one convention: the loss of a step is the mean over ranks of what the ranks return, and DeepSpeed,
like DDP, averages the ranks' gradients. Both ways to write a loss over the global batch are then exact: every rank
computes all of it and returns the same number, or every rank averages over its own rows and compares them with all.
All ranks must make the same calls in the same order. One rank alone makes none.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.errors import TrainingError
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.tensors import sum_type

#: What reaches a rank's own rows in the backward pass: the sum over all ranks, or this rank's share alone.
Gradient = Literal["sum", "official"]


def gather(tensor: Tensor, ranks: Ranks, views: int = 1) -> Tensor:
    """Gather the rows of all ranks, without gradient.

    Args:
        tensor: This rank's rows [B, ...], of any type; the same shape on every rank.
        ranks: This process among all.
        views: Neighbouring rows that belong to one sample and stay neighbours.

    Returns:
        [B * world_size, ...] in the order of positions.

    Raises:
        TrainingError: B is not a multiple of `views`.
    """
    _check_views(tensor, views)
    if ranks.world_size == 1:
        return tensor.detach()
    return _all_rows(tensor.detach(), ranks, views)


def gather_with_gradient(tensor: Tensor, ranks: Ranks, views: int = 1, gradient: Gradient = "sum") -> Tensor:
    """Gather the rows of all ranks as `gather` does, with gradient.

    Args:
        tensor: This rank's rows [B, ...]; the same shape on every rank.
        ranks: This process among all.
        views: Neighbouring rows that belong to one sample and stay neighbours.
        gradient: "sum": every rank's rows get the gradients of all ranks' losses, which gives the gradient of the
            global loss at any number of ranks. "official": only what this rank's own loss gives to its own rows; the
            rows of others count as constants. So do CLIP's, SimCLR's and TVTSv2's code. Where all ranks compute the
            same loss, the gradient is then 1 / world_size of the true one, while losses without gather keep theirs.

    Raises:
        TrainingError: B is not a multiple of `views`, or an unknown `gradient`.
    """
    _check_views(tensor, views)
    if gradient not in get_args(Gradient):
        raise TrainingError(f"gradient of a gather: found {gradient!r}, allowed: {', '.join(get_args(Gradient))}")
    if ranks.world_size == 1:
        return tensor
    rows: Tensor = _GatherWithGradient.apply(tensor, ranks, views, gradient)
    return rows


def own_rows(count: int, ranks: Ranks, views: int = 1) -> Tensor:
    """Return the places of this rank's `count` rows among the gathered ones, int64 [count]: labels over own rows."""
    row = torch.arange(count, device=ranks.device)
    slot, view = row // views, row % views
    return (slot * ranks.world_size + ranks.rank) * views + view


def gather_ragged(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """Gather the rows of all ranks where these have different numbers of them, without gradient.

    Args:
        tensor: This rank's rows [B, ...], on its device; the shape behind B is the same on every rank.
        ranks: This process among all.

    Returns:
        The rows of each rank, in the order of ranks.
    """
    if ranks.world_size == 1:
        return [tensor.detach()]
    counts = gather(torch.tensor([len(tensor)], device=tensor.device), ranks).tolist()
    # Padded to the most that any rank has: collectives of one size know no other.
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    by_rank = gather(padded, ranks).unflatten(0, (-1, ranks.world_size)).transpose(0, 1)
    return [rows[:count] for rows, count in zip(by_rank, counts, strict=True)]


def exchange(tensor: Tensor, sends: Sequence[int], receives: Sequence[int], ranks: Ranks) -> Tensor:
    """Send each rank rows of its own, without gradient; every rank knows beforehand how many it is sent.

    Args:
        tensor: Rows [sum(sends), ...], those for rank 0 first, on this rank's device.
        sends: How many go to each rank.
        receives: How many come from each rank.
        ranks: This process among all.

    Returns:
        [sum(receives), ...], those of rank 0 first.
    """
    if ranks.world_size == 1:
        return tensor.detach()
    received = tensor.new_empty(sum(receives), *tensor.shape[1:])
    dist.all_to_all_single(received, tensor.detach().contiguous(), list(receives), list(sends))
    return received


def sum_with_gradient(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Sum all ranks' tensors of one shape, the same on each; half types are added up in float32."""
    if ranks.world_size == 1:
        return tensor
    total: Tensor = _SumWithGradient.apply(tensor)
    return total


def mean(value: Tensor, ranks: Ranks, count: Tensor | float | None = None) -> Tensor:
    """Average over ranks without gradient; arguments as `mean_with_gradient`."""
    return mean_with_gradient(value.detach(), ranks, count)


def mean_with_gradient(value: Tensor, ranks: Ranks, count: Tensor | float | None = None) -> Tensor:
    """Average over ranks, with gradient to `value`.

    Args:
        value: This rank's mean; a scalar, or any shape that all ranks share.
        ranks: This process among all.
        count: How many things `value` is the mean of (masked tokens, say), or their weight. The result is then the mean
            over all of them: a rank that counts 0 has no part in it, whatever its value, NaN included. Where all count
            0, the values count alike. Gets no gradient.

    Such a rank's `value` gets the gradient 0, and what the value was made by passes it on: `losses[mask].mean()` as 0,
    but `(losses * mask).sum() / mask.sum()` as 0 / 0, NaN; divide by `mask.sum().clamp(min=1)`.
    """
    if ranks.world_size == 1:
        return value
    if count is None:
        return sum_with_gradient(value, ranks) / ranks.world_size
    weight = torch.as_tensor(count, dtype=sum_type(value), device=value.device).detach().expand_as(value)
    # Not value * weight alone: the mean of nothing is NaN, and NaN * 0 is NaN on all ranks.
    # Nor torch.where, which copies its 0.0 to the device, and waits for that.
    weighted = (value * weight).masked_fill(~(weight > 0), 0.0)
    weighted, weights, plain = sum_with_gradient(torch.stack([weighted, weight, value.to(weight.dtype)]), ranks)
    return torch.where(weights > 0, weighted / weights, plain / ranks.world_size).to(value.dtype)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, views: int, gradient: Gradient) -> Tensor:
        ctx.ranks, ctx.views, ctx.gradient = ranks, views, gradient
        return _all_rows(tensor, ranks, views)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # Back to blocks by rank, as reduce_scatter deals them out: else ranks would get each other's gradients.
        by_rank = gradients[0].unflatten(0, (-1, ctx.ranks.world_size, ctx.views)).transpose(0, 1).flatten(1, 2)
        if ctx.gradient == "official":
            return by_rank[ctx.ranks.rank], None, None, None
        sent = by_rank.to(sum_type(by_rank)).contiguous()
        own = torch.empty_like(sent[0])
        dist.reduce_scatter_tensor(own, sent.flatten(0, 1))
        return own.to(by_rank.dtype), None, None, None


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _total(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every rank's loss depends on every rank's tensor, so the gradients of all losses add up.
        return _total(gradients[0])


def _all_rows(tensor: Tensor, ranks: Ranks, views: int) -> Tensor:
    size, world_size = len(tensor), ranks.world_size
    by_rank = tensor.new_empty((world_size * size, *tensor.shape[1:]))
    dist.all_gather_into_tensor(by_rank, tensor.contiguous())
    # The collective puts rank after rank; a queue filled that way would depend on the number of ranks.
    return by_rank.unflatten(0, (world_size, size // views, views)).transpose(0, 1).flatten(0, 2)


def _total(tensor: Tensor) -> Tensor:
    total = tensor.to(sum_type(tensor), copy=True).contiguous()
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def _check_views(tensor: Tensor, views: int) -> None:
    if views < 1 or len(tensor) % views:
        raise TrainingError(
            f"gather: found {len(tensor)} rows with {views} views a sample, allowed: a multiple of the views; "
            "rows of one sample lie next to each other"
        )
