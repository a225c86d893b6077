"""Regions of interest of SparseFormer's tokens: where they begin, how they move, and the points that lie in them.

A region is (x1, y1, x2, y2) as shares of width and height, of a clip (x1, y1, t1, x2, y2, t2), time as a share of its
length. Nothing clamps it: it may leave the image. All of this is float32, also in networks that compute in half types,
where a pixel of a large image could not be told from the next one (systems/sparseformer.md, 2.2, 2.5, 2.6).
Shapes: B images, N tokens, P points, a axes (2, or 3 with time), D channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.linear import Linear

#: Highest frequency of a region's code, in half turns a unit (systems/sparseformer_bootstrap.md, 2.3).
TOP_FREQUENCY = 128.0


def first_regions(count: int, replicates: int | None = None) -> Tensor:
    """Lay out the first regions: half-size boxes on a square grid, and the whole image for those left over.

    Args:
        count: tokens of an image, N.
        replicates: slices of a clip, each with N tokens, slice after slice; None: an image.

    Returns:
        [N, 4], of a clip [N * replicates, 6].
    """
    root = math.isqrt(count)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1)
    # A single box has no second grid line to lie on, and begins in the corner.
    steps = torch.arange(root) * (0.5 / max(root - 1, 1))
    # x goes with the slow index, officially.
    corners = torch.cartesian_prod(steps, steps)
    boxes[: root**2] = torch.cat((corners, corners + 0.5), dim=1)
    return boxes if replicates is None else as_tubes(boxes, replicates)


def as_tubes(boxes: Tensor, replicates: int) -> Tensor:
    """Repeat boxes [N, 4] for slices of a clip that divide its length: tubes [N * replicates, 6], slice after slice."""
    start = torch.arange(replicates, dtype=boxes.dtype).repeat_interleave(len(boxes))[:, None] / replicates
    low, high = boxes.repeat(replicates, 1).chunk(2, dim=1)
    return torch.cat((low, start, high, start + 1 / replicates), dim=1)


def first_offsets(points: int, scattered: bool) -> Tensor:
    """Lay points [P, 2] out as the cell centres of a square grid around 0, x fastest.

    Args:
        points: P; where it is no square, those left over are drawn.
        scattered: draw these from a normal distribution (train code), else uniformly and all of them (library).
    """
    root = math.isqrt(points)
    centres = (torch.arange(root) + 0.5) / root - 0.5
    grid = torch.cartesian_prod(centres, centres).flip(1)
    if root**2 == points:
        return grid
    return torch.cat((grid, torch.randn(points - root**2, 2))) if scattered else torch.rand(points, 2) - 0.5


def time_offsets(points: int) -> Tensor:
    """Spread points [P] over a tube's length: cell centres of P cells around 0, neighbours far apart.

    They are those of a permutation, so that no direction of the image goes with time.
    """
    step = round(points * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, points) > 1:
        step += 1
    return (torch.arange(points) * step % points + 0.5) / points - 0.5


def moved(regions: Tensor, change: Tensor) -> Tensor:
    """Move and scale regions [B, N, 2a] by `change` [B, N, 2a]: centres in units of the size, sizes by exponents."""
    low, high = regions.chunk(2, dim=-1)
    shift, growth = change.to(regions.dtype).chunk(2, dim=-1)
    size = (high - low).abs()
    centre = (low + high) / 2 + shift * size
    half = size * growth.exp() / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def points_in(regions: Tensor, offsets: Tensor, eps: float, time_eps: float) -> Tensor:
    """Place points [B, N, P, a] in regions [B, N, 2a] by `offsets` [B, N, P, a].

    Offsets are normalised over a token's points to a third of a region's size; so points may lie a little outside.

    Args:
        eps: added to the deviation of offsets.
        time_eps: the same on the axis of time, where there is one.
    """
    low, high = regions.chunk(2, dim=-1)
    deviation = offsets.std(dim=2, keepdim=True)  # unbiased, as officially
    if offsets.shape[-1] == 3:
        deviation = torch.cat((deviation[..., :2] + eps, deviation[..., 2:] + time_eps), dim=-1)
    else:
        deviation = deviation + eps
    normalised = (offsets - offsets.mean(dim=2, keepdim=True)) / (3 * deviation)
    # The signed size: a region whose corners have changed places turns its points round, officially.
    return ((low + high) / 2)[:, :, None] + normalised * (high - low)[:, :, None]


@torch.no_grad()
def region_code(coordinates: Tensor, dim: int) -> Tensor:
    """Encode coordinates [B, N, k] of regions by sines and cosines, D/k channels each: [B, N, D], without gradient."""
    channels = dim // coordinates.shape[-1]
    frequencies = torch.linspace(0, math.log(TOP_FREQUENCY), channels, device=coordinates.device).exp()
    phases = math.pi * coordinates.float()[..., None] * frequencies
    # Each frequency has a sine or a cosine, not both.
    return torch.cat((phases[..., 0::2].sin(), phases[..., 1::2].cos()), dim=-1).flatten(2)


class SmallNorm(nn.LayerNorm):
    """Layer norm whose weight starts at D^-0.5."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.normalized_shape[0] ** -0.5)
        nn.init.zeros_(self.bias)


class RegionNorm(SmallNorm):
    """The same in float32, whatever the weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)


class RegionLinear(Linear):
    """Linear layer in float32, whatever the weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(wide(x), wide(self.weight), None if self.bias is None else wide(self.bias))


def wide(x: Tensor) -> Tensor:
    """Give a tensor of half type as float32; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
