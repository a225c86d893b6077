"""Maps of pictures by any classifier's backbone: those of several strides that it has, or its tokens' one."""

from typing import Any

import torch
from torch import Tensor

from finetune.detection.roi_head import feature_map
from pretrain.errors import RecipeError
from pretrain.models.base import Classifier, MapLevel


def map_levels(architecture: Classifier, given: Any) -> tuple[MapLevel, ...]:
    """Tell the maps that `picture_maps` gives, computed without memory.

    Args:
        architecture: of the backbone.
        given: the recipe's input section.

    Raises:
        RecipeError: tokens don't lie on a grid, or a picture is several steps of time to it.
    """
    if levels := architecture.maps():
        return tuple(levels)
    grid = architecture.token_grid(*given.size)
    if grid.time != 1:
        raise RecipeError(f"input.frames: found {given.frames}, allowed: as many as the model takes in one step")
    with torch.device("meta"), torch.no_grad():
        found = feature_map(architecture.build(), torch.empty(1, *given.size, 3), grid)
    return (MapLevel(found.shape[1], given.size[1] // grid.height),)


def picture_maps(model: Any, architecture: Classifier, video: Tensor, frames: int) -> list[Tensor]:
    """Compute a backbone's maps of normalised pictures [B, 1, H, W, 3], finest first.

    Args:
        model: module of the backbone.
        architecture: of it.
        video: pictures.
        frames: times that a model of videos is shown a picture, since its tokens are that long.
    """
    if architecture.maps():
        maps: list[Tensor] = model.forward_maps(video)
        return maps
    video = video.expand(-1, frames, -1, -1, -1)
    return [feature_map(model, video, architecture.token_grid(*video.shape[1:4]))]


def freeze_behind_maps(model: Any, architecture: Classifier) -> None:
    """Leave parameters behind the maps as they are: without a gradient, weight decay would pull them to zero."""
    if not architecture.maps():
        return
    for name, parameter in model.named_parameters():
        if name.startswith(architecture.behind_maps):
            parameter.requires_grad_(False)
