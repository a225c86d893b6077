"""Pixels as networks take them: float32 in [0, 1], normalised by ImageNet's statistics."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.data.media import MEAN, STD


class PixelNormalization(nn.Module):
    """ImageNet normalisation of pixels in [0, 1] with channels last; stays float32 when the model is cast."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # From NumPy: deepspeed.zero.Init rounds what torch's constructors make to the weights' type.
        self.register_buffer("mean", torch.from_numpy(np.array(MEAN, np.float32)), persistent=False)
        self.register_buffer("std", torch.from_numpy(np.array(STD, np.float32)), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # A cast to bfloat16 would leave 8 bits of the statistics; only the device is followed.
        self.mean = torch.from_numpy(np.array(MEAN, np.float32)).to(self.mean.device)
        self.std = torch.from_numpy(np.array(STD, np.float32)).to(self.std.device)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise flattened cubes [..., n*3], channel fastest, to the same shape."""
        return ((pixels.unflatten(-1, (-1, 3)) - self.mean) / self.std).flatten(-2)


def unit_pixels(cubes: Tensor) -> Tensor:
    """Make pixels float32 in [0, 1]: uint8 divided by 255, floating types taken as they are."""
    return cubes.float().div_(255) if cubes.dtype == torch.uint8 else cubes.float()
