"""Maps of the keyframe at four strides, made of a plain ViT's blocks (EVAD; systems/evad.md sections 2.1 and 2.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Levels of the pyramid, finest first; the stride of level l is 2^l pixels with patches of 16.
LEVELS = (2, 3, 4, 5)
#: Sides of the levels relative to the token grid.
SCALES = (4.0, 2.0, 1.0, 0.5)


class PyramidConv(nn.Conv2d):
    """Convolution of the pyramid with its first weights, Kaiming-uniform with a = 1, and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=1)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def keyframe_maps(outputs: Sequence[Tensor], height: int, width: int) -> list[Tensor]:
    """Make maps of blocks' tokens [B, n, C], whose first height x width are the keyframe's: [B, C, h, w], h by stride.

    Resized by nearest neighbours; height and width must be even.
    """
    maps = [tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width)) for tokens in outputs]
    return [F.interpolate(one, scale_factor=scale) for one, scale in zip(maps, SCALES, strict=True)]


def feature_pyramid(maps: Sequence[Tensor], lateral: Sequence[nn.Module], output: Sequence[nn.Module]) -> list[Tensor]:
    """Compute p2 to p5, [B, D, h, w], of maps, finest first: lateral convolution, sum from the top down, convolution.

    Lin et al., Feature Pyramid Networks, 2017; upsampling by nearest neighbours. The official p6 is read by nothing.
    """
    merged: list[Tensor] = []
    for one, conv in zip(reversed(maps), reversed(lateral), strict=True):
        side = conv(one)
        merged.append(side if not merged else side + F.interpolate(merged[-1], scale_factor=2.0))
    return [conv(one) for one, conv in zip(reversed(merged), output, strict=True)]


def levels_of(boxes: Tensor, patch_size: int = 16) -> Tensor:
    """Tell the level int64 [M] that boxes [M, 4] in pixels are pooled from, by their area, unclipped and without +1."""
    sides = boxes[:, 2:] - boxes[:, :2]
    # A box of 14 patches, with those of 16 the 224 pixels of pre-training of old, belongs to level 4.
    exact = 4 + torch.log2(sides.prod(dim=1).sqrt() / (14 * patch_size) + 1e-8)
    # clamp lets NaN through, and its conversion is another number on each device.
    return exact.floor().nan_to_num(LEVELS[0]).clamp(LEVELS[0], LEVELS[-1]).long()
