"""Features at points of a map, and the limit on what they may move points (systems/sparseformer.md, 2.7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Padding = Literal["zeros", "border"]


@dataclass
class LossScale:
    """Factor on the loss whose gradient comes back: that of fp16 training, else 1."""

    value: float = 1.0


class PointSampler(nn.Module):
    """Bilinear samples of a map, of a clip's map trilinear ones.

    Args:
        padding: outside of the map: zeros, or the value at its border.
        clamped: clamp the gradient of each point's coordinate to the inverse of the map's height (with time: of the
            axis' length) times the loss scale, so that single sharp edges don't throw regions about.
        time_border: take points before the first and behind the last frame's middle for these; else a sample there
            fades by `padding`.
    """

    #: The one that the engine sets, where it trains the model.
    scale = LossScale()

    def __init__(self, padding: Padding, clamped: bool, time_border: bool) -> None:
        super().__init__()
        self.padding, self.clamped, self.time_border = padding, clamped, time_border

    def forward(self, maps: Tensor, points: Tensor) -> Tensor:
        """Sample maps [B, C, (T,) H, W] at points [B, N, P, a], (x, y(, t)) from 0 to 1: [B, N, P, C] float32."""
        if self.clamped:
            points = _ClampedGradient.apply(points, self._limits(maps))
        if points.shape[-1] == 2:
            sampled = self._sample(maps, points)
        else:
            if self.time_border:
                half = 0.5 / maps.shape[2]
                points = torch.cat((points[..., :2], points[..., 2:].clamp(half, 1 - half)), dim=-1)
            sampled = self._sample(maps, points[..., None, :]).squeeze(-1)
        return sampled.permute(0, 2, 3, 1)

    def _sample(self, maps: Tensor, points: Tensor) -> Tensor:
        # One type for both is needed, and that of coordinates has to be float32.
        return F.grid_sample(maps.to(points.dtype), 2 * points - 1, "bilinear", self.padding, align_corners=False)

    def _limits(self, maps: Tensor) -> list[float]:
        sizes = maps.shape[2:]
        # Of images officially the height's for both axes.
        lengths = [sizes[0]] * 2 if len(sizes) == 2 else [sizes[2], sizes[1], sizes[0]]
        return [self.scale.value / length for length in lengths]


def follow_loss_scale(model: nn.Module) -> LossScale:
    """Let all samplers of a model follow the loss scale that is returned; set it before each forward pass."""
    scale = LossScale()
    for module in model.modules():
        if isinstance(module, PointSampler):
            module.scale = scale
    return scale


class _ClampedGradient(torch.autograd.Function):
    """Points as they are, with a gradient that is clamped on each axis."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, limits: Sequence[float]) -> Tensor:
        # Kept here: a forward pass of another model in between must not change what this one's backward pass does.
        ctx.limits = limits
        return points.view_as(points)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        axes = gradients[0].unbind(-1)
        clamped = [axis.clamp(-limit, limit) for axis, limit in zip(axes, ctx.limits, strict=True)]
        return torch.stack(clamped, dim=-1), None
