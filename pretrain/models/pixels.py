"""Pixels as networks take them: float32 in [0, 1], normalised by ImageNet's statistics or others."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.data.media import MEAN, STD
from pretrain.errors import RecipeError


class PixelNormalization(nn.Module):
    """Normalisation of pixels in [0, 1] with channels last; stays float32 when the model is cast.

    Args:
        mean: of red, green and blue; default: ImageNet's.
        std: deviation of each.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self._statistics = {"mean": np.array(mean, np.float32), "std": np.array(std, np.float32)}
        for name, values in self._statistics.items():
            # From NumPy: deepspeed.zero.Init rounds what torch's constructors make to the weights' type.
            self.register_buffer(name, torch.from_numpy(values.copy()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # A cast to bfloat16 would leave 8 bits of the statistics; only the device is followed.
        self.mean, self.std = (
            torch.from_numpy(values.copy()).to(getattr(self, name).device)
            for name, values in self._statistics.items()
        )
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise flattened cubes [..., n*3], channel fastest, to the same shape."""
        return ((pixels.unflatten(-1, (-1, 3)) - self.mean) / self.std).flatten(-2)


def unit_pixels(cubes: Tensor) -> Tensor:
    """Make pixels float32 in [0, 1]: uint8 divided by 255, floating types taken as they are."""
    return cubes.float().div_(255) if cubes.dtype == torch.uint8 else cubes.float()


def single_pictures(pixels: Tensor, model: str) -> Tensor:
    """Lay pictures out as [B, 3, H, W]: they are so already, or clips of one frame [B, 1, H, W, 3].

    Raises:
        RecipeError: clips of several frames, for a `model` of that name, which takes none.
    """
    if pixels.dim() == 4:
        return pixels
    if pixels.shape[1] != 1:
        raise RecipeError(f"clips of {pixels.shape[1]} frames: {model} takes single pictures")
    return pixels[:, 0].permute(0, 3, 1, 2)
