"""Attention that tokens get, without the whole matrix of attention weights (systems/evit.md section 6.1)."""

import torch
from torch import Tensor

from pretrain.models.recompute import maybe_recompute

#: Queries whose attention weights exist at the same time while received attention is summed up.
QUERY_CHUNK = 256


def class_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Compute the attention [B, N] of the first token to every token, mean over heads; only that row is computed."""
    row = (query[:, :, :1] @ key.transpose(-2, -1)) * scale
    return row.softmax(-1).mean(1)[:, 0]


def received_attention(query: Tensor, key: Tensor, scale: float, weight: Tensor | None = None) -> Tensor:
    """Compute the attention [B, N] that every token receives, mean over heads and queries; sums to 1.

    `weight` [N] multiplies that of each query, without normalisation (EVAD's enhanced keyframe). Attention weights of
    `QUERY_CHUNK` queries exist at a time, in the backward pass too, where they are computed again.
    """
    total = torch.zeros(query.shape[0], key.shape[2], device=query.device)
    chunks = query.split(QUERY_CHUNK, dim=2)
    counts = [None] * len(chunks) if weight is None else weight.split(QUERY_CHUNK)
    for chunk, count in zip(chunks, counts, strict=True):
        total = total + maybe_recompute(query.requires_grad, _column_sums, chunk, key, scale, count)
    return total / (query.shape[1] * query.shape[2])


def _column_sums(query: Tensor, key: Tensor, scale: float, weight: Tensor | None) -> Tensor:
    attention = ((query @ key.transpose(-2, -1)) * scale).softmax(-1)
    # Summed per chunk: the whole [B, h, N, N] would be the memory that fused attention saves.
    if weight is not None:
        # As a product, 20 times as fast on CPUs; the other sum keeps the bits by which plain scores have always ranked.
        return (weight @ attention).sum(1)
    return torch.einsum("bhqk,q->bk", attention, torch.ones(query.shape[2], device=query.device))
