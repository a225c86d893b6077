"""From a backbone's maps to maps of one width and five strides, which a detector looks at.

Maps of several strides are joined from the coarsest down (Lin et al., Feature Pyramid Networks, arXiv 1612.03144); a
plain ViT's one map becomes four by itself, without joining (Li et al., ViTDet, arXiv 2203.16527). The backbones' maps
have no norm of their own, so each is normalised first. Shapes: maps [B, C, h, w], finest first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.base import MapLevel

#: Strides of the maps that boxes are pooled from; one of twice the last is made for proposals alone.
STRIDES = (4, 8, 16, 32)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each place of a map: it asks nothing of the size of a batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class DetectionPyramid(nn.Module):
    """Base: forward(maps of a backbone) -> maps [B, C, h, w] of strides 4 to 64."""

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Make them."""
        raise NotImplementedError


class JoinedPyramid(DetectionPyramid):
    """A feature pyramid network: each map, and what the coarser ones know of it.

    Args:
        levels: the backbone's maps, of strides 4 to 32.
        channels: of the pyramid.
    """

    def __init__(self, levels: Sequence[MapLevel], channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(level.channels) for level in levels)
        self.laterals = nn.ModuleList(nn.Conv2d(level.channels, channels, 1) for level in levels)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in levels)
        _start(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        above: Tensor | None = None
        merged: list[Tensor] = []
        for one, norm, lateral in reversed(list(zip(maps, self.norms, self.laterals, strict=True))):
            here = lateral(norm(one))
            above = here if above is None else here + F.interpolate(above, here.shape[2:], mode="nearest")
            merged.insert(0, above)
        found = [output(one) for output, one in zip(self.outputs, merged, strict=True)]
        return [*found, F.max_pool2d(found[-1], 1, 2)]


class SimplePyramid(DetectionPyramid):
    """Maps of strides 4 to 32 of a plain ViT's one, each made of it alone.

    Args:
        level: the one map, of stride 8, 16 or 32.
        channels: of the pyramid.
    """

    def __init__(self, level: MapLevel, channels: int) -> None:
        super().__init__()
        branches = []
        for stride in STRIDES:
            layers, width = _resampling(level, stride)
            layers += [nn.Conv2d(width, channels, 1, bias=False), ChannelNorm(channels)]
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels)]
            branches.append(nn.Sequential(*layers))
        self.branches = nn.ModuleList(branches)
        _start(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        (single,) = maps
        found = [branch(single) for branch in self.branches]
        return [*found, F.max_pool2d(found[-1], 1, 2)]


def _resampling(level: MapLevel, stride: int) -> tuple[list[nn.Module], int]:
    """Build the layers from a map to one of another stride, and tell their width; finer ones halve it at each step."""
    layers: list[nn.Module] = []
    width, at = level.channels, level.stride
    while at > stride:
        if layers:
            layers += [ChannelNorm(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, max(width // 2, 1), 2, 2))
        width, at = max(width // 2, 1), at // 2
    while at < stride:
        layers.append(nn.MaxPool2d(2, 2))
        at *= 2
    return layers, width


def _start(pyramid: nn.Module) -> None:
    """Give convolutions their first weights: torchvision's for pyramids."""
    for layer in pyramid.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build_pyramid(levels: Sequence[MapLevel], channels: int) -> DetectionPyramid:
    """Build the pyramid for a backbone's maps, or its tokens' one."""
    if len(levels) == 1:
        return SimplePyramid(levels[0], channels)
    return JoinedPyramid(levels, channels)


def pyramid_problems(levels: Sequence[MapLevel]) -> list[str]:
    """List what keeps a pyramid from being built: boxes are placed by whole strides of 4 to 32."""
    strides = [level.stride for level in levels]
    if len(levels) == 1 and strides[0] not in (8, 16, 32):
        return [f"model.patch_size: tokens {strides[0]} pixels apart; allowed with this task: 8, 16 or 32"]
    if len(levels) > 1 and strides != [*STRIDES]:
        return [f"model: maps of strides {strides}; allowed with this task: {[*STRIDES]}"]
    return []


def meta_maps(levels: Sequence[MapLevel], height: int, width: int) -> list[Tensor]:
    """Make a backbone's maps of a picture without memory, to count by."""
    return [
        torch.empty(1, one.channels, -(-height // one.stride), -(-width // one.stride), device="meta")
        for one in levels
    ]
