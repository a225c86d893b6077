"""Localisation of persons by learned proposals: Sparse R-CNN's heads (Sun et al. 2021; systems/evad.md section 2.4).

Official parameter names. Shapes: B clips, P proposals of each, M = B x P boxes, D channels. Boxes are x1, y1, x2, y2 in
pixels of the frame, continuous, not clipped; they stay float32 where the network computes in half types.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.evad.pyramid import LEVELS, SCALES, levels_of
from pretrain.models.linear import xavier
from pretrain.models.roi_align import roi_align
from pretrain.runtime.tensors import has_content

#: Person and no object, in this order.
PERSON, NOTHING = 0, 1
#: Weight of proposals without a person in the loss.
NOTHING_WEIGHT = 0.1
#: Divisor of the predicted shifts of a box's centre; those of its sides are taken as they are.
SHIFT_WEIGHT = 2.0
#: A head changes a side by at most this factor's logarithm.
MAX_LOG_SIDE = math.log(100000 / 16)
#: Samples along each side of a pooling bin.
SAMPLES = 2


class Drawn(nn.Linear):
    """Linear layer with a Xavier-uniform weight, and PyTorch's own bias or none."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        xavier(self.weight)


class Proposals(nn.Embedding):
    """A learned row for each proposal; called without argument, so that ZeRO stage 3 gathers it, it gives them all.

    Args:
        count: P.
        dim: channels.
        value: that all rows begin with; None: drawn, standard normal.
    """

    def __init__(self, count: int, dim: int, value: Sequence[float] | None = None) -> None:
        self.value = value  # before the base class, whose constructor calls reset_parameters
        super().__init__(count, dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for column, start in enumerate(self.value or ()):
            self.weight[:, column] = start

    def forward(self) -> Tensor:  # type: ignore[override]
        return self.weight


class ProposalAttention(nn.Module):
    """Self-attention of a clip's proposals, parameters named as in `nn.MultiheadAttention`.

    Not that class: it reads `out_proj`'s weights instead of calling it, and ZeRO stage 3 gathers at calls.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(xavier(torch.empty(3 * dim, dim)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Drawn(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix proposals [B, P, D]."""
        joint = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = joint.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed: Tensor = self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return mixed


class DynamicInteraction(nn.Module):
    """Two layers over a box's pooled features, whose weights are computed from its proposal's features."""

    def __init__(self, dim: int, hidden: int, bins: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.dynamic_layer = Drawn(dim, 2 * dim * hidden)
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(dim)
        self.out_layer = Drawn(dim * bins, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, features: Tensor, pooled: Tensor) -> Tensor:
        """Compute [M, D] of proposals' features [M, D] and pooled ones [M, bins, D]."""
        first, second = self.dynamic_layer(features).chunk(2, dim=-1)
        x = F.relu(self.norm1(pooled @ first.unflatten(1, (-1, self.hidden))))
        x = F.relu(self.norm2(x @ second.unflatten(1, (self.hidden, -1))))
        return F.relu(self.norm3(self.out_layer(x.flatten(1))))


def head_layers(count: int, dim: int) -> nn.Sequential:
    """Stack Linear without bias, LayerNorm, ReLU."""
    layers = [part for _ in range(count) for part in (Drawn(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU())]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class LocalisationSizes:
    """Sizes of a head: channels, attention heads, hidden channels, channels of dynamic weights, bins a side; and the
    side of a patch in pixels, from which the strides of the pyramid follow."""

    dim: int = 256
    heads: int = 8
    hidden: int = 2048
    dynamic: int = 64
    pool: int = 7
    patch_size: int = 16


class LocalisationHead(nn.Module):
    """One refinement of all proposals' features and boxes."""

    def __init__(self, sizes: LocalisationSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.pool, self.patch_size = sizes.pool, sizes.patch_size
        self.self_attn = ProposalAttention(dim, sizes.heads)
        self.inst_interact = DynamicInteraction(dim, sizes.dynamic, sizes.pool**2)
        self.linear1 = Drawn(dim, sizes.hidden)
        self.linear2 = Drawn(sizes.hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.cls_module = head_layers(1, dim)
        self.reg_module = head_layers(3, dim)
        self.class_logits = Drawn(dim, 2)
        self.bboxes_delta = Drawn(dim, 4)

    def forward(self, pyramid: Sequence[Tensor], boxes: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Refine.

        Args:
            pyramid: p2 to p5, [B, D, h, w].
            boxes: [B, P, 4].
            features: of the proposals, [B, P, D].

        Returns:
            logits float32 [B, P, 2] (person, no object), boxes float32 [B, P, 4], features [B, P, D].
        """
        batch, count = boxes.shape[:2]
        images = clip_of(batch, count, boxes.device)
        pooled = pool_by_level(pyramid, boxes.flatten(0, 1), images, self.pool, self.patch_size)
        features = self.norm1(features + self.self_attn(features))
        x = features.flatten(0, 1)
        x = self.norm2(x + self.inst_interact(x, pooled.flatten(2).transpose(1, 2)))
        x = self.norm3(x + self.linear2(F.relu(self.linear1(x))))
        logits = self.class_logits(self.cls_module(x)).float()
        moved = move_boxes(boxes.flatten(0, 1), self.bboxes_delta(self.reg_module(x)).float())
        return logits.unflatten(0, (batch, count)), moved.unflatten(0, (batch, count)), x.unflatten(0, (batch, count))


def clip_of(batch: int, count: int, device: torch.device) -> Tensor:
    """Number the clip of each of `count` boxes a clip, int64 [B x count]."""
    return torch.arange(batch, device=device).repeat_interleave(count, output_size=batch * count)


def pool_by_level(pyramid: Sequence[Tensor], boxes: Tensor, images: Tensor, size: int, patch_size: int = 16) -> Tensor:
    """Pool the features [M, D, size, size] of boxes [M, 4], each from the level of its area.

    Every level stays in the graph, also where no box falls on it: its convolutions get zero gradients, not missing
    ones, for which ranks would wait for each other in vain.
    """
    # In a plan boxes have no content: all on one level is as much work.
    levels = levels_of(boxes, patch_size) if has_content(boxes) else None
    pooled = pyramid[0].new_zeros(len(boxes), pyramid[0].shape[1], size, size)
    for level, scale, features in zip(LEVELS, SCALES, pyramid, strict=True):
        if levels is None:
            chosen = torch.arange(len(boxes) if level == LEVELS[0] else 0, device=boxes.device)
        else:
            chosen = torch.nonzero(levels == level)[:, 0]
        part = roi_align(features, boxes[chosen], images[chosen], size, scale / patch_size, SAMPLES, aligned=True)
        pooled = pooled.index_copy(0, chosen, part)
    return pooled


def move_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Move boxes [M, 4] by predicted shifts [M, 4]: centres by shares of the sides, sides by exponentials.

    Sides that are positive stay so. Gradients reach boxes and shifts.
    """
    shift, growth = deltas.split(2, dim=1)
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + 0.5 * sides + shift / SHIFT_WEIGHT * sides
    half = 0.5 * sides * growth.clamp(max=MAX_LOG_SIDE).exp()
    return torch.cat((centres - half, centres + half), dim=1)


def absolute_boxes(shares: Tensor, sizes: Tensor) -> Tensor:
    """Turn proposals [P, 4], centre and side as shares of the frame, to boxes [B, P, 4] in pixels.

    Args:
        shares: centre x, centre y, width, height.
        sizes: height and width of each clip's frames before padding, [B, 2].
    """
    shares = shares.float()
    centres, half = shares[:, :2], 0.5 * shares[:, 2:]
    corners = torch.cat((centres - half, centres + half), dim=1)
    return corners[None] * frame_scale(sizes)[:, None]


def frame_scale(sizes: Tensor) -> Tensor:
    """Give width, height, width, height, float32 [B, 4], of sizes [B, 2] (height, width)."""
    return sizes.flip(1).repeat(1, 2).float()
