"""Actions of the persons found, refined by what the encoder's surviving tokens tell (EVAD; systems/evad.md 2.5).

Official parameter names. Shapes: B clips, P proposals of each, t time steps, N = t x h x w places, Nv surviving tokens
(those of the keyframe first), C channels of the encoder and D of the decoder, K actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.cubes import Grid
from pretrain.models.dropout import drop_path_rates
from pretrain.models.evad.grid_positions import GridPositions
from pretrain.models.evad.localisation import SAMPLES, Drawn, LocalisationHead, LocalisationSizes, clip_of
from pretrain.models.linear import Linear, xavier
from pretrain.models.recompute import Recompute, maybe_recompute
from pretrain.models.roi_align import roi_align
from pretrain.models.vit import Block


@dataclass(frozen=True)
class ContextSizes:
    """Sizes of the decoder, and what is pooled for it.

    Attributes:
        dim, depth, heads, hidden: of its blocks.
        actions: K.
        action_hidden: channels inside each block's classifier.
        pool: bins along each side of a box.
        stride: pixels of a token.
        extension: share of a box's width and height that it is extended by for pooling, half of it on each side.
        drop_path: of the last block.
        eps: of the blocks' layer norms.
    """

    dim: int
    depth: int
    heads: int
    hidden: int
    actions: int
    action_hidden: int
    pool: int
    stride: int
    extension: tuple[float, float]
    drop_path: float
    eps: float


class ActionBlock(Block):
    """A block with a classifier of its own; only the last one's answer is used, the others help to train."""

    def __init__(self, sizes: ContextSizes, drop_path: float) -> None:
        super().__init__(sizes.dim, sizes.heads, sizes.hidden, sizes.eps, drop_path=drop_path)
        self.act_module = nn.Sequential(
            Drawn(sizes.dim, sizes.action_hidden, bias=False), nn.LayerNorm(sizes.action_hidden), nn.ReLU()
        )
        self.action_logits = Linear(sizes.action_hidden, sizes.actions)

    def forward(self, x: Tensor, persons: Any = None) -> Any:
        """Transform tokens [B, Nv + P, D], and classify the last `persons` of them: logits float32 [B, P, K]."""
        x = super().forward(x)
        return x, self.action_logits(self.act_module(x[:, x.shape[1] - persons :])).float()


class ContextDecoder(nn.Module):
    """Blocks over surviving tokens and persons together, without a last norm."""

    def __init__(self, sizes: ContextSizes) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ActionBlock(sizes, rate) for rate in drop_path_rates(sizes.drop_path, sizes.depth))

    def forward(self, x: Tensor, persons: int, recompute: Recompute) -> list[Tensor]:
        """Give each block's logits float32 [B, P, K] of tokens [B, Nv + P, D], the persons at the end."""
        logits = []
        for block in self.blocks:
            x, found = maybe_recompute(recompute, block, x, persons)
            logits.append(found)
        return logits


@dataclass(frozen=True)
class ActorPredictions:
    """What a detector tells of a batch; boxes in pixels of the frame, not clipped, first refinement first.

    Attributes:
        person_logits: of each localisation head, float32 [B, P, 2] (person, no object).
        boxes: of each localisation head, float32 [B, P, 4].
        action_logits: of each decoder block, float32 [B, P, K].
    """

    person_logits: list[Tensor]
    boxes: list[Tensor]
    action_logits: list[Tensor]


class ActorHead(nn.Module):
    """Localisation and classification: `det_head` of the official names."""

    def __init__(
        self,
        dim: int,
        heads: int,
        localisation: LocalisationSizes,
        context: ContextSizes,
        positions: GridPositions,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.sizes, self.positions, self.recompute = context, positions, recompute
        self.mask_token = nn.Parameter(xavier(torch.empty(1, 1, context.dim)))
        self.s0_headseries = nn.ModuleList(LocalisationHead(localisation) for _ in range(heads))
        self.encoder_to_decoder = Drawn(dim, context.dim, bias=False)
        self.decoder = ContextDecoder(context)

    def forward(
        self,
        pyramid: Sequence[Tensor],
        tokens: Tensor,
        places: Tensor,
        grid: Grid,
        proposals: tuple[Tensor, Tensor],
        sizes: Tensor,
    ) -> ActorPredictions:
        """Find persons, and tell their actions.

        Args:
            pyramid: maps of the keyframe, p2 to p5.
            tokens: surviving tokens behind the encoder's norm, [B, Nv, C].
            places: index of each on the grid, int64 [B, Nv], see `placed`.
            grid: of all tokens.
            proposals: first boxes [B, P, 4] in pixels, and features [P, D].
            sizes: height and width of each clip's frames before padding, int64 [B, 2].
        """
        boxes, features = proposals[0], proposals[1].expand(len(sizes), -1, -1)
        logits, moved = [], []
        for head in self.s0_headseries:
            found, boxes, features = head(pyramid, boxes, features)
            logits.append(found)
            moved.append(boxes)
            # A head's error must not reach the boxes that it was given, as officially.
            boxes = boxes.detach()
        return ActorPredictions(logits, moved, self.actions(tokens, places, grid, boxes, sizes))

    def actions(self, tokens: Tensor, places: Tensor, grid: Grid, boxes: Tensor, sizes: Tensor) -> list[Tensor]:
        """Classify the persons in boxes [B, P, 4]: logits of each block."""
        x = self.decoder_input(tokens, places, grid, boxes, sizes)
        logits: list[Tensor] = self.decoder(x, boxes.shape[1], self.recompute)
        return logits

    def decoder_input(self, tokens: Tensor, places: Tensor, grid: Grid, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Put surviving tokens, with position codes, and the persons' features, without, together: [B, Nv + P, D]."""
        visible = self.encoder_to_decoder(tokens)
        table = self.positions(grid, visible)
        persons = self.person_features(visible, places, grid, boxes, sizes)
        return torch.cat((visible + table[places], persons), dim=1)

    def person_features(self, visible: Tensor, places: Tensor, grid: Grid, boxes: Tensor, sizes: Tensor) -> Tensor:
        """Pool features [B, P, D] of boxes from the clip's volume, in which mask tokens stand for dropped ones."""
        batch, count = boxes.shape[:2]
        volume = self.mask_token.to(visible.dtype).expand(batch, grid.tokens, -1)
        volume = volume.scatter(1, places[:, :, None].expand(-1, -1, visible.shape[2]), visible)
        volume = volume + self.positions(grid, visible)
        # Time among the channels: all time steps are pooled from the same places, which are looked up once.
        maps = volume.unflatten(1, (grid.time, grid.height, grid.width)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        extended = extend_boxes_inclusive(boxes, sizes, self.sizes.extension).flatten(0, 1)
        images = clip_of(batch, count, boxes.device)
        pooled = roi_align(maps, extended, images, self.sizes.pool, 1 / self.sizes.stride, SAMPLES, aligned=True)
        steps = pooled.flatten(2).amax(2).unflatten(1, (grid.time, -1))
        return steps.mean(1).unflatten(0, (batch, count))


def placed(origin: Tensor, keyframe: int, official: bool) -> Tensor:
    """Tell the places that surviving tokens are given, int64 [B, Nv].

    Args:
        origin: where on the grid they come from, int64 [B, Nv], the keyframe's first.
        keyframe: number of these.
        official: the released models put tokens, which pruning has sorted by falling score, on the places in ascending
            order, so content and place of dropped time steps' tokens don't belong together; they have learned so.
    """
    if not official:
        return origin
    return torch.cat((origin[:, :keyframe], origin[:, keyframe:].sort(dim=1).values), dim=1)


def extend_boxes_inclusive(boxes: Tensor, sizes: Tensor, extension: tuple[float, float]) -> Tensor:
    """Extend boxes [B, P, 4] and clip them to their frames, whose last pixel is size - 1.

    Args:
        boxes: in pixels.
        sizes: height and width of frames before padding, [B, 2].
        extension: share of width and height (x2 - x1 + 1), half of it on each side (action_detection section 3.2).
    """
    sides = boxes[..., 2:] - boxes[..., :2] + 1
    pad = torch.stack((sides[..., 0] * extension[0], sides[..., 1] * extension[1]), dim=-1) / 2
    last = (sizes.flip(1) - 1)[:, None].to(boxes.dtype)
    start = torch.minimum((boxes[..., :2] - pad).clamp(min=0), last)
    end = torch.minimum((boxes[..., 2:] + pad).clamp(min=0), last)
    return torch.cat((start, end), dim=-1)
