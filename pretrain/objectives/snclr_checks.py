"""What keeps an SNCLR recipe from working, and what in it is likely not meant."""

import math
from typing import Any

import torch

from pretrain.models.base import Classifier
from pretrain.recipe.schema import Recipe

#: Views of each sample.
VIEWS = 2


def feature_channels(architecture: Classifier) -> int:
    """Tell the channels of an encoder's features, by a pass on tensors that take no memory."""
    with torch.device("meta"), torch.no_grad():
        features = architecture.build().eval()(torch.empty(1, *architecture.input.size, 3))
    return int(features.shape[-1])


def option_problems(recipe: Recipe, architecture: Classifier) -> list[str]:
    """List what in the recipe can't work."""
    options, found = recipe.objective, _number_problems(recipe.objective)
    if recipe.input.views != VIEWS:
        found.append(f"input.views: found {recipe.input.views}, allowed: {VIEWS}, which are compared")
    if recipe.model.classes != 0:
        found.append(f"model.classes: found {recipe.model.classes}, allowed: 0; the projector takes the head's place")
    if architecture.full_precision and recipe.compute.dtype != "fp32":
        found.append(f"compute.dtype: found {recipe.compute.dtype}, allowed with model.name={recipe.model.name}: fp32, "
                     "its batch norms' running statistics lose small steps in 16 bits")  # fmt: skip
    if options.neighbours > options.queue >= 1:
        found.append(f"objective.neighbours: found {options.neighbours}, allowed: up to objective.queue, "
                     f"{options.queue}")  # fmt: skip
    if options.attention == "linear" and options.neighbours == 0:
        found.append("objective.attention: found linear, allowed with objective.neighbours=0: none, as its layers "
                     "would never be trained")  # fmt: skip
    return found


def _number_problems(options: Any) -> list[str]:
    found = [
        f"objective.{name}: found {getattr(options, name)}, allowed: 1 or more"
        for name in ("dim", "hidden", "projector_layers", "queue")
        if getattr(options, name) < 1
    ]
    if options.neighbours < 0:
        found.append(f"objective.neighbours: found {options.neighbours}, allowed: 0 or more")
    for name in ("temperature", "attention_scale"):
        if not 0 < getattr(options, name) < math.inf:
            found.append(f"objective.{name}: found {getattr(options, name):g}, allowed: more than 0")
    if not 0 <= options.momentum <= 1:
        found.append(f"objective.momentum: found {options.momentum:g}, allowed: 0 to 1")
    if options.chunk is not None and options.chunk < 1:
        found.append(f"objective.chunk: found {options.chunk}, allowed: 1 or more, or null")
    return found


def unusual(recipe: Recipe) -> list[str]:
    """Name options that have no effect, or are likely not meant."""
    options, found = recipe.objective, []
    if options.neighbours == 0:
        found += [
            f"objective.{name} has no effect: objective.neighbours is 0"
            for name in ("exclude_same_file", "wait_for_queue", "threshold")
            if getattr(options, name)
        ]
    if options.queue < recipe.batch.samples and options.neighbours:
        found.append(
            f"objective.queue={options.queue} is less than batch.samples={recipe.batch.samples}: keys that find no "
            "place at its end are dropped, so most keys of a step are never searched"
        )
    if options.momentum == 1:
        found.append("objective.momentum=1: the momentum encoder stays as it was drawn")
    return found
