"""Attention of GroupMixFormer: between tokens, and between groups of tokens that convolutions make of them.

Shapes: B pictures, D channels, H x W the map, N = HW tokens, h = 8 heads of c channels, s = D/5 = 2c channels/segment.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.dropout import stochastic_depth
from pretrain.models.folded_norms import ConvolutionsBeforeNorms
from pretrain.models.linear import JointProjection, Linear, truncated_normal
from pretrain.models.vit import Mlp

#: Attention heads of every stage, and segments that channels are cut into.
HEADS, SEGMENTS = 8, 5
#: Sides of the group aggregators' kernels, for the second to fourth segment.
KERNELS = (3, 5, 7)
#: Heads whose relative positions have kernels of side 3, 5 and 7: not the heads that were aggregated by them.
POSITION_HEADS = (2, 3, 3)
NORM_EPS = 1e-6
#: Least channels of a group norm's group: alone, a channel of a map of one place would always become zero.
LEAST_GROUP = 8

MapNorm = Literal["batch", "group"]


def map_norm(channels: int, kind: MapNorm) -> nn.Module:
    """Build the norm of a map's channels: over all rows, or over groups of neighbouring channels of each row alone."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    fitting = (size for size in range(min(LEAST_GROUP, channels), channels + 1) if channels % size == 0)
    return nn.GroupNorm(channels // next(fitting), channels)


class SeparableConvolution(nn.Module):
    """Depthwise and then pointwise convolution, without biases, padded to keep the size that a stride leaves."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
        self.pointwise_conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.pointwise_conv(self.conv1(x))
        return mixed


class BypassBranch(nn.Module):
    """The segment that attention does not see: a separable convolution of queries, keys and values together."""

    def __init__(self, segment: int) -> None:
        super().__init__()
        self.conv = SeparableConvolution(3 * segment, segment, 3)
        self.norm = nn.LayerNorm(segment)  # epsilon 1e-5, unlike the blocks' norms

    def forward(self, maps: Tensor) -> Tensor:
        """Compute tokens [B, N, s] of maps [B, 3s, H, W], channels of queries before those of keys and values."""
        return F.hardswish(self.norm(self.conv(maps).flatten(2).transpose(1, 2)))


class GroupAggregator(ConvolutionsBeforeNorms):
    """Aggregation of tokens to groups: each segment of queries, keys and values by a kernel of its own.

    The same layers act on queries, keys and values, and batch norms take their statistics of all three.
    """

    NORMS = tuple((f"agg{index}.pointwise_conv", f"norm{index}") for index in range(1, len(KERNELS) + 1))

    def __init__(self, dim: int, norm: MapNorm) -> None:
        super().__init__()
        segment = dim // SEGMENTS
        self.norm0 = map_norm(segment, norm)
        for index, kernel in enumerate(KERNELS, 1):
            self.add_module(f"agg{index}", SeparableConvolution(segment, segment, kernel))
            self.add_module(f"norm{index}", map_norm(segment, norm))
        self.agg0 = BypassBranch(segment)

    def forward(self, qkv: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Aggregate.

        Args:
            qkv: tokens [3B, N, D], all queries before all keys and all values.

        Returns:
            heads [3, B, h, N, c] of queries, keys and values, and the bypass [B, N, s].
        """
        tokens, *others, last = qkv.transpose(1, 2).unflatten(2, (height, width)).chunk(SEGMENTS, 1)
        groups = [self.norm0(tokens)]
        for index, segment in enumerate(others, 1):
            aggregated = self.get_submodule(f"agg{index}")(segment)
            groups.append(self.get_submodule(f"norm{index}")(aggregated))
        # [3B, 4s, H, W] -> [3, B, h, N, c]: a head is c neighbouring channels, two heads a segment.
        mixed = F.hardswish(torch.cat(groups, 1)).unflatten(0, (3, -1)).flatten(3).unflatten(2, (HEADS, -1))
        bypass: Tensor = self.agg0(last.unflatten(0, (3, -1)).transpose(0, 1).flatten(1, 2))
        return mixed.transpose(3, 4), bypass


class RelativePositions(nn.Module):
    """Queries times depthwise convolutions of values: what lies where beside a token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.splits = [heads * channels for heads in POSITION_HEADS]
        self.conv_list = nn.ModuleList(
            nn.Conv2d(split, split, kernel, padding=kernel // 2, groups=split)
            for split, kernel in zip(self.splits, KERNELS, strict=True)
        )

    def forward(self, query: Tensor, value: Tensor, height: int, width: int) -> Tensor:
        """Compute the term [B, h, N, c] of queries and values [B, h, N, c]."""
        maps = value.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width)).split(self.splits, 1)
        near = torch.cat([layer(part) for layer, part in zip(self.conv_list, maps, strict=True)], 1)
        return query * near.flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3)


class GroupMixAttention(nn.Module):
    """Attention, linear in the number of tokens, of aggregated queries, keys and values."""

    def __init__(self, dim: int, norm: MapNorm) -> None:
        super().__init__()
        # Of all channels, although heads share four fifths of them, and rounded down: released weights were trained so.
        self.scale = (dim // HEADS) ** -0.5
        self.qkv = JointProjection(dim, True, truncated_normal)
        self.aggregator = GroupAggregator(dim, norm)
        self.crpe = RelativePositions(dim * (SEGMENTS - 1) // SEGMENTS // HEADS)
        self.proj = Linear(dim, dim, init=truncated_normal)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Mix tokens [B, N, D]."""
        stacked = self.qkv(x).unflatten(2, (3, -1)).permute(2, 0, 1, 3).flatten(0, 1)
        heads, bypass = self.aggregator(stacked, height, width)
        query, key, value = heads.unbind(0)
        # Over tokens, not channels; in float32, since these are thousands (9,216 in the first stage at 384 pixels).
        weights = key.softmax(2, dtype=torch.float32).to(value.dtype)
        mixed = self.scale * (query @ (weights.transpose(2, 3) @ value)) + self.crpe(query, value, height, width)
        projected: Tensor = self.proj(torch.cat((mixed.transpose(1, 2).flatten(2), bypass), 2))
        return projected


class ConvolutionalPosition(nn.Module):
    """A depthwise convolution added to what it sees, which tells tokens where they lie."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Add positions to tokens [B, N, D]."""
        return x + self.proj(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)


class GroupMixBlock(nn.Module):
    """Positions, attention and MLP, each added to the tokens."""

    def __init__(self, dim: int, hidden: int, drop_path: float, norm: MapNorm) -> None:
        super().__init__()
        self.cpe = ConvolutionalPosition(dim)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.att = GroupMixAttention(dim, norm)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, hidden, init=truncated_normal)
        # Two, since draws are by a layer's name: one would leave out both branches of a picture or none.
        self.drop_path1, self.drop_path2 = stochastic_depth(drop_path), stochastic_depth(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Transform tokens [B, N, D] of a map of H x W."""
        x = self.cpe(x, height, width)
        x = x + self.drop_path1(self.att(self.norm1(x), height, width))
        mixed: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return mixed
