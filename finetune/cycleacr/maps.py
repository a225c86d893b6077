"""Maps over time, from backbones that have some and from those that have tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.backbone import Backbone
from pretrain.models.base import Architecture, Classifier, MapsBackbone, MapsShape
from pretrain.models.cubes import Grid
from pretrain.models.token_reorganisation import Tokens


def maps_shape(architecture: Architecture, model: nn.Module, size: tuple[int, int, int]) -> MapsShape:
    """Tell the sizes of a model's maps for clips of frames x height x width.

    Raises:
        RecipeError: it has neither maps nor tokens on a grid.
    """
    if isinstance(architecture, MapsBackbone):
        return architecture.maps()
    if isinstance(architecture, Classifier) and isinstance(model, Backbone):
        grid = architecture.token_grid(*size)
        return MapsShape((model.dim,), (grid.time,), grid.height / size[1])
    raise RecipeError(
        f"model.name={architecture.config.name}: found {type(model).__name__}, allowed with objective cycleacr: a ViT "
        "with tokens on a grid (classifier, image_vit), or a backbone of maps (slowfast, video_swin)"
    )


def time_map(model: Any, video: Tensor, grid: Grid) -> Tensor:
    """Lay a ViT's tokens, behind its last norm, out as a map over time [B, C, t, h, w].

    Where it drops tokens on the way, a place that has lost its own is given the fused token, which stands for them, or
    else the mean of the clip's tokens.

    Args:
        model: a `Backbone`.
        video: normalised pixels [B, T, H, W, 3].
        grid: of the clip's tokens.
    """
    if model.reorganisation is not None:
        tokens = _placed(model, model.encode(video), grid)
    else:
        # Class tokens stand in front.
        tokens = model.forward_features(video, pooled=False)[:, -grid.tokens :]
    return tokens.unflatten(1, (grid.time, grid.height, grid.width)).permute(0, 4, 1, 2, 3)


def _placed(model: Any, tokens: Tokens, grid: Grid) -> Tensor:
    """Put survivors back at their places [B, N, C]."""
    x = model.normed(tokens.x)[:, model.class_tokens :]
    assert tokens.origin is not None, "tokens were dropped"
    # A fused token has no place: it goes into a row of its own. No two tokens have one place, so nothing is summed.
    rows = torch.where(tokens.origin >= 0, tokens.origin, grid.tokens)
    index = rows[:, :, None].expand_as(x)
    placed = x.new_zeros(len(x), grid.tokens + 1, x.shape[2]).scatter(1, index, x)
    there = x.new_zeros(len(x), grid.tokens + 1, 1).scatter(1, index[:, :, :1], torch.ones_like(x[:, :, :1]))
    others = placed[:, -1:] if model.reorganisation.config.fuse else x.mean(1, keepdim=True)
    return torch.where(there[:, :-1] > 0, placed[:, :-1], others)
