"""Tokens of a SparseFormer laid out on a map, for heads that need one (systems/sparseformer.md, section 9)."""

import torch
from torch import Tensor

from pretrain.models.sparseformer.regions import wide


def token_maps(tokens: Tensor, regions: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Spread tokens evenly over their regions.

    A cell of the map gets the mean of the tokens whose regions meet it. A token weighs as much as a share of its region
    lies in the cell: where a narrow look and a wide one lie over one another, the narrow one says more.

    Args:
        tokens: [B, N, D], one for each region: without class tokens.
        regions: [B, N, 2a] as shares of width and height (and length), see `regions`.
        size: of the map, (H, W), with time (T, H, W).

    Returns:
        map [B, D, (T,) H, W] in the tokens' type, zero where no region is; and the weight of each cell, float32
        [B, 1, (T,) H, W], which adds up to the number of tokens less what of their regions is outside of the picture.
    """
    low, high = wide(regions).chunk(2, dim=-1)
    # Regions whose corners have changed places cover the same.
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    # Axes of regions are x, y(, t), those of maps the other way round.
    shares = [_shares(low[..., axis], high[..., axis], cells) for axis, cells in enumerate(reversed(size))]
    cover = shares[0]
    for share in shares[1:]:
        cover = share.reshape(*share.shape, *[1] * (cover.dim() - 2)) * cover[:, :, None]
    cover = cover.flatten(2)
    weight = cover.sum(1, keepdim=True)
    # A cell that nothing covers: 0 / 1, not 0 / 0.
    maps = wide(tokens).transpose(1, 2) @ (cover / weight.masked_fill(weight == 0, 1))
    return maps.to(tokens.dtype).unflatten(2, size), weight.unflatten(2, size)


def _shares(low: Tensor, high: Tensor, cells: int) -> Tensor:
    """Tell the shares [B, N, cells] of stretches from `low` to `high` [B, N] that lie in equal cells from 0 to 1."""
    edges = torch.arange(cells + 1, device=low.device, dtype=low.dtype) / cells
    inside = torch.minimum(high[..., None], edges[1:]) - torch.maximum(low[..., None], edges[:-1])
    # A region may shrink to a line, which still lies somewhere.
    return inside.clamp(min=0) / (high - low).clamp(min=torch.finfo(low.dtype).eps)[..., None]
