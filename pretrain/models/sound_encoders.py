"""Encoders of sound: spectrograms to one vector, by convolutions (AVID's Conv2D-10) or by a small ViT.

Source: systems/speed_coaug.md, section 2, from facebookresearch/AVID-CMA @ 4538e40. Spectrograms are float32
[B, columns, bins], time first.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.encoder import size_problems
from pretrain.models.linear import Linear
from pretrain.models.positions import SinCosPositions
from pretrain.models.recompute import Recompute, maybe_recompute, run_blocks
from pretrain.models.vit import Block

#: Strides of Conv2D-10's blocks; each has twice as many channels as the one before, the first as many as the stem.
STRIDES = (2, 2, 2, 1)


@dataclass
class SoundEncoder:
    """Encoder of spectrograms."""

    kind: Literal["conv2d", "vit"] = "conv2d"
    """conv2d: AVID's ten layers with batch norm; vit: patches, blocks, and the mean of all tokens"""
    width: int = 64
    """conv2d: channels behind the first convolution; 8 times as many leave the last block"""
    patch_size: int = 16
    """vit: columns and bins of a patch"""
    dim: int = 192
    """vit: channels"""
    depth: int = 12
    """vit: blocks"""
    heads: int = 3
    """vit: attention heads"""

    def problems(self, key: str) -> list[str]:
        """Say what can't be built; `key` is the name of this section."""
        sizes = ("width",) if self.kind == "conv2d" else ("patch_size", "dim", "depth", "heads")
        found = size_problems(self, sizes, key)
        if not found and self.kind == "vit" and self.dim % self.heads:
            found.append(f"{key}.heads={self.heads}: does not divide {key}.dim={self.dim}")
        return found

    @property
    def features(self) -> int:
        """Channels of the vector."""
        return 8 * self.width if self.kind == "conv2d" else self.dim


class PlainBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, without a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)))


class ConvolutionalSoundEncoder(nn.Module):
    """Conv2D-10: a stem and four blocks, then the maximum over time and frequency; parameters have AVID's names."""

    def __init__(self, width: int, recompute: Recompute = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.conv1 = nn.Sequential(nn.Conv2d(1, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width))
        channels = [width * 2 ** max(number - 1, 0) for number in range(len(STRIDES) + 1)]
        for number, stride in enumerate(STRIDES, 1):
            self.add_module(f"block{number}", PlainBlock(channels[number - 1], channels[number], stride))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Compute vectors [B, 8 width] of spectrograms [B, columns, bins]."""
        x = F.relu(self.conv1(spectrogram[:, None].to(next(self.parameters()).dtype)))
        for number in range(1, len(STRIDES) + 1):
            x = maybe_recompute(self.recompute, self.get_submodule(f"block{number}"), x)
        return x.amax((2, 3))


class SpectrogramViT(nn.Module):
    """A ViT on patches of a spectrogram, padded with its mean, 0, to whole ones; positions by frequency, then time."""

    def __init__(self, options: SoundEncoder, size: tuple[int, int], recompute: Recompute = False) -> None:
        super().__init__()
        self.patch_size, self.recompute = options.patch_size, recompute
        self.grid = tuple(math.ceil(side / options.patch_size) for side in size)
        self.proj = Linear(options.patch_size**2, options.dim)
        self.positions = SinCosPositions(math.prod(self.grid), options.dim)
        blocks = (Block(options.dim, options.heads, 4 * options.dim, 1e-6) for _ in range(options.depth))
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(options.dim, eps=1e-6)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Compute vectors [B, dim] of spectrograms [B, columns, bins]."""
        side = self.patch_size
        columns, bins = (count * side for count in self.grid)
        padded = F.pad(spectrogram, (0, bins - spectrogram.shape[2], 0, columns - spectrogram.shape[1]))
        patches = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3).flatten(1, 2)
        x = self.proj(patches.to(self.proj.weight.dtype))
        x = x + self.positions(torch.arange(x.shape[1], device=x.device)[None]).to(x.dtype)
        mean: Tensor = self.norm(run_blocks(self.blocks, x, self.recompute)).mean(1)
        return mean


def build_sound_encoder(options: SoundEncoder, size: tuple[int, int], recompute: Recompute = False) -> Any:
    """Build the encoder of spectrograms of so many columns and bins."""
    if options.kind == "conv2d":
        return ConvolutionalSoundEncoder(options.width, recompute)
    return SpectrogramViT(options, size, recompute)
