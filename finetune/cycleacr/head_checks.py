"""Checks of a CycleACR recipe."""

from finetune.recipe import TuneRecipe
from pretrain.models.base import MapsShape

#: Options that count something, with the least that they can be.
LEAST = {"dim": 1, "hidden": 1, "depth": 1, "instance_depth": 1, "max_persons": 1}


def check_head(recipe: TuneRecipe, maps: MapsShape, layers: int) -> list[str]:
    """List what keeps the head from being built or trained on a backbone's maps.

    Args:
        recipe: the run.
        maps: of the backbone.
        layers: number of the backbone's last layer; 0: it has none that rates could follow.
    """
    options, inputs = recipe.objective, sum(maps.channels)
    found = [
        f"objective.{name}={getattr(options, name)}, allowed: {least} or more"
        for name, least in LEAST.items()
        if getattr(options, name) < least
    ]
    if options.outputs is not None and (options.outputs < 1 or (options.fusion == "add" and options.outputs != inputs)):
        allowed = f"{inputs}, the channels that it is added to" if options.fusion == "add" else "1 or more"
        found.append(f"objective.outputs={options.outputs}, allowed with objective.fusion={options.fusion}: {allowed}")
    if not 0 <= options.dropout < 1:
        found.append(f"objective.dropout={options.dropout}, allowed: a probability from 0 to below 1")
    found += [
        f"objective.{name}={getattr(options, name)}, allowed: more than 0"
        for name in ("head_scale", "bias_scale")
        if getattr(options, name) <= 0
    ]
    if not layers and recipe.optim.layer_decay != 1:
        found.append(
            f"optim.layer_decay={recipe.optim.layer_decay:g}, allowed with model.name={recipe.model.name}: 1 (it "
            "has no layers by which rates could fall)"
        )
    if recipe.zero.stage == 3:
        # Ranks with fewer keyframes would have to take part in others' passes, and in exchanges of the memory besides.
        found.append("zero.stage=3, allowed with objective cycleacr: 0 to 2")
    return found + options.memory.problems()
