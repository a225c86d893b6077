"""From a clip's tokens to a feature of each box: a map, RoIAlign, maximum.

Source: systems/action_detection.md sections 3.2, 3.3 and 6, from MCG-NJU/VideoMAE-Action-Detection.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.models.backbone import Backbone
from pretrain.models.cubes import Grid
from pretrain.models.roi_align import roi_align
from pretrain.models.token_reorganisation import Tokens

#: Bins along each side of a box.
BINS = 7


def clip_of_box(counts: Tensor, boxes: int) -> Tensor:
    """Number the clip of each of `boxes` boxes, int64 [N], from the counts int64 [B]."""
    clips = torch.arange(len(counts), device=counts.device)
    return clips.repeat_interleave(counts, output_size=boxes)


def pad_with_zeros(video: Tensor, sizes: Tensor) -> Tensor:
    """Put zeros where a clip [B, T, H, W, 3] ends before its batch does; sizes int64 [B, 2] are height and width.

    Officially zeros are filled in behind the normalisation; black pixels would be something else.
    """
    rows = torch.arange(video.shape[2], device=video.device) < sizes[:, :1]
    columns = torch.arange(video.shape[3], device=video.device) < sizes[:, 1:]
    inside = rows[:, :, None] & columns[:, None, :]
    return torch.where(inside[:, None, :, :, None], video, torch.zeros((), dtype=video.dtype, device=video.device))


def extend_boxes_inclusive(boxes: Tensor, scale: tuple[float, float], sizes: Tensor) -> Tensor:
    """Grow boxes by (sx w / 2, sy h / 2) on both sides, w = x2 - x1 + 1, and cut them to their frames' last pixels.

    Args:
        boxes: float [N, 4] in pixels.
        scale: sx, sy; negative ones shrink. Boxes without area stay.
        sizes: height and width of each box's frame, int64 [N, 2].
    """
    factors = torch.tensor(scale, dtype=boxes.dtype, device=boxes.device)
    margin = (boxes[:, 2:] - boxes[:, :2] + 1) * factors / 2
    grown = torch.cat((boxes[:, :2] - margin, boxes[:, 2:] + margin), dim=1)
    most = (sizes.flip(1) - 1).to(boxes.dtype).repeat(1, 2)
    return torch.minimum(grown.clamp(min=0), most)


def feature_map(model: Any, video: Tensor, grid: Grid) -> Tensor:
    """Compute the mean over time of a clip's tokens at each place, [B, C, h, w].

    Where a model drops tokens on the way, the mean at a place is over those that are left there. A place that has lost
    all of them is given the fused token, which stands for them (the mean of several, by how many they stand for), or
    else the mean of the clip's tokens.

    Args:
        model: a classifier's module.
        video: normalised pixels [B, T, H, W, 3].
        grid: of the clip's tokens.
    """
    if isinstance(model, Backbone) and model.reorganisation is not None:
        return _map_of_survivors(model, model.encode(video), grid)  # type: ignore[operator]
    # Class tokens stand in front.
    tokens = model.forward_features(video, pooled=False)[:, -grid.tokens :]
    return tokens.unflatten(1, (grid.time, grid.height, grid.width)).mean(1).permute(0, 3, 1, 2)


def _map_of_survivors(model: Any, tokens: Tokens, grid: Grid) -> Tensor:
    x = model.normed(tokens.x)[:, model.class_tokens :]
    assert tokens.origin is not None and tokens.sizes is not None, "tokens were dropped"
    there = tokens.origin >= 0
    # A fused token has no place: it goes into a row that is cut off. No two others have one place, so nothing is
    # summed in an order that differs from run to run.
    rows = torch.where(there, tokens.origin, grid.tokens)
    index = rows[:, :, None].expand_as(x)
    placed = x.new_zeros(len(x), grid.tokens + 1, x.shape[2]).scatter(1, index, x)
    left = x.new_zeros(len(x), grid.tokens + 1, 1).scatter(1, index[:, :, :1], torch.ones_like(x[:, :, :1]))
    # There may be several: one that a block fused and a later one kept.
    fused = tokens.sizes.masked_fill(there, 0) if model.reorganisation.config.fuse else torch.ones_like(tokens.sizes)
    others = (fused / fused.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)[:, None] @ x
    sums, counts = (one[:, :-1].unflatten(1, (grid.time, -1)).sum(1) for one in (placed, left))
    means = torch.where(counts > 0, sums / counts.clamp(min=1), others)
    return means.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)


def pool_boxes(features: Tensor, boxes: Tensor, clips: Tensor, scale: float, bins: int = BINS) -> Tensor:
    """Pool maps [B, C, h, w] to a feature of each box, [N, C]: RoIAlign, not aligned, then the largest of the bins.

    Args:
        features: maps.
        boxes: in pixels, inside their frames, [N, 4].
        clips: number of each box's clip, int64 [N].
        scale: of the maps, 1 / patch size.
        bins: along each side of a box.
    """
    return roi_align(features, boxes, clips, bins, scale, within=True).amax((2, 3))
