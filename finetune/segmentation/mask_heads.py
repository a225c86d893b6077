"""Heads of semantic segmentation: from a backbone's maps to scores of classes.

UperNet is that of Xiao et al. (arXiv 1807.10221) as mmsegmentation builds it, with an auxiliary head; a plain ViT's one
map becomes four by `MapPyramid` (Li et al., arXiv 2203.16527). Shapes: maps [B, C, h, w], finest first; K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.base import Cost, MapLevel
from pretrain.models.dropout import ChannelDropout

#: Bins along a side of the last map, whose means tell what the whole picture shows.
POOL_SCALES = (1, 2, 3, 6)
#: Channels of the auxiliary head, and the dropout in front of classifiers.
AUXILIARY_CHANNELS, DROPOUT = 256, 0.1


class NormedMap(nn.Module):
    """Convolution that keeps the size, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps bilinearly, by edges of pixels and not by their centres."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """What a map shows as a whole and in parts of it, beside the map itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(NormedMap(inputs, outputs, 1) for _ in POOL_SCALES)
        self.bottleneck = NormedMap(inputs + len(POOL_SCALES) * outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [
            resized(stage(F.adaptive_avg_pool2d(x, scale)), x.shape[2:])
            for stage, scale in zip(self.stages, POOL_SCALES, strict=True)
        ]
        mixed: Tensor = self.bottleneck(torch.cat((x, *pooled), 1))
        return mixed


class MapPyramid(nn.Module):
    """Four maps of a plain ViT's one: four and two times its side, itself, and half of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.twice = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.norm = nn.BatchNorm2d(channels)
        self.again = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.once = nn.ConvTranspose2d(channels, channels, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        finest = self.again(F.gelu(self.norm(self.twice(x))))
        # ceil_mode, or a map of one place would have no half.
        return [finest, self.once(x), x, F.max_pool2d(x, 2, 2, ceil_mode=True)]


class MaskHead(nn.Module):
    """Base: forward(maps) -> scores [B, K, h, w] at the finest map, and those of an auxiliary head or None."""

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Score."""
        raise NotImplementedError


class LinearMaskHead(MaskHead):
    """One linear layer of all maps together, behind a batch norm (DINOv2's linear evaluation)."""

    def __init__(self, levels: Sequence[MapLevel], classes: int) -> None:
        super().__init__()
        channels = sum(level.channels for level in levels)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        joined = torch.cat([resized(one, maps[0].shape[2:]) for one in maps], 1)
        return self.classifier(self.norm(joined)), None


class UperNetHead(MaskHead):
    """Pyramid pooling of the last map, added downwards to the finer ones, which are then joined.

    Args:
        levels: the backbone's maps; of a single one a pyramid is made.
        classes: K.
        channels: of the head.
        auxiliary: build a small head on the last map but one as well, which training looks at.
    """

    auxiliary: nn.Sequential | None
    pyramid: MapPyramid | None

    def __init__(self, levels: Sequence[MapLevel], classes: int, channels: int, auxiliary: bool) -> None:
        super().__init__()
        single = len(levels) == 1
        widths = [level.channels for level in levels] * (4 if single else 1)
        self.pyramid = MapPyramid(widths[0]) if single else None
        self.pooling = PyramidPooling(widths[-1], channels)
        self.lateral_convs = nn.ModuleList(NormedMap(width, channels, 1) for width in widths[:-1])
        self.fpn_convs = nn.ModuleList(NormedMap(channels, channels, 3) for _ in widths[:-1])
        self.fpn_bottleneck = NormedMap(len(widths) * channels, channels, 3)
        self.dropout = ChannelDropout(DROPOUT)
        self.classifier = nn.Conv2d(channels, classes, 1)
        layers = NormedMap(widths[-2], AUXILIARY_CHANNELS, 3), ChannelDropout(DROPOUT)
        self.auxiliary = nn.Sequential(*layers, nn.Conv2d(AUXILIARY_CHANNELS, classes, 1)) if auxiliary else None

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        maps = maps if self.pyramid is None else self.pyramid(maps[0])
        merged = [self.pooling(maps[-1])]
        for one, lateral in zip(maps[-2::-1], reversed(self.lateral_convs), strict=True):
            merged.append(lateral(one) + resized(merged[-1], one.shape[2:]))
        coarsest, *finer = merged
        smooth = [conv(one) for one, conv in zip(reversed(finer), self.fpn_convs, strict=True)]
        joined = torch.cat([resized(one, maps[0].shape[2:]) for one in (*smooth, coarsest)], 1)
        scores = self.classifier(self.dropout(self.fpn_bottleneck(joined)))
        aside = self.auxiliary(maps[-2]) if self.auxiliary is not None and self.training else None
        return scores, aside


def head_cost(head: MaskHead, levels: Sequence[MapLevel], height: int, width: int) -> Cost:
    """Count what a head's convolutions multiply for a picture; `head` must lie on the meta device."""
    macs = 0.0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        # All of its weight meets each place that a transposed convolution is given, and each that another one gives.
        places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        macs += float(places[0, 0].numel() * layer.weight.numel())

    hooks = [layer.register_forward_hook(count) for layer in head.modules()
             if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]  # fmt: skip
    maps = [torch.empty(1, one.channels, -(-height // one.stride), -(-width // one.stride), device="meta")
            for one in levels]  # fmt: skip
    with torch.no_grad():
        head.eval()(maps)
    for hook in hooks:
        hook.remove()
    return Cost({"mask head": macs})
