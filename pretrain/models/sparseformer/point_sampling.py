"""Features at points of a map, and the limit on what they may move points (systems/sparseformer.md, 2.7)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.gradient_limits import LimitedGradient

Padding = Literal["zeros", "border"]
#: Rows of a rank in the published training, which the clamp's limit is for.
PUBLISHED_ROWS = 128


class PointSampler(LimitedGradient):
    """Bilinear samples of a map, of a clip's map trilinear ones.

    Args:
        padding: outside of the map: zeros, or the value at its border.
        clamped: clamp the gradient of each point's coordinate to the inverse of the map's height (with time: of the
            axis' length) times the loss scale, for losses that are means over 128 rows, so that single sharp edges
            don't throw regions about.
        time_border: take points before the first and behind the last frame's middle for these; else a sample there
            fades by `padding`.
    """

    def __init__(self, padding: Padding, clamped: bool, time_border: bool) -> None:
        super().__init__()
        self.padding, self.clamped, self.time_border = padding, clamped, time_border

    def forward(self, maps: Tensor, points: Tensor) -> Tensor:
        """Sample maps [B, C, (T,) H, W] at points [B, N, P, a], (x, y(, t)) from 0 to 1: [B, N, P, C] float32."""
        if self.clamped and torch.is_grad_enabled():
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
        return [self.scale.limit(1 / length, PUBLISHED_ROWS) for length in lengths]


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
