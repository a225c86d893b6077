"""Checks of a recipe of detection in pictures."""

from finetune.recipe import TuneRecipe
from finetune.task_checks import Unread, check_held_out, held_out_warnings

#: Keys of classification that this task has nothing for.
UNREAD = Unread(
    evaluate=("clips", "crops", "average", "micro"), source=("sampling", "flip", "short_side", "stride")
)


def check_instances(recipe: TuneRecipe) -> list[str]:
    """List what can't work, beyond each component's own checks."""
    options, found = recipe.objective, []
    if recipe.model.classes < 1:
        found.append(f"model.classes: found {recipe.model.classes}, allowed: 1 or more (COCO: 80)")
    if recipe.compute.dtype != "fp32":
        found.append(f"compute.dtype: found {recipe.compute.dtype}, allowed: fp32; 16 bits don't hold a box's place")
    found += [
        f"objective.{name}: found {getattr(options, name)}, allowed: 1 or more"
        for name in ("channels", "anchor", "box_channels", "mask_channels", "most")
        if getattr(options, name) < 1
    ]
    if options.boxes < 4:
        found.append(f"objective.boxes: found {options.boxes}, allowed: 4 or more, a quarter of which have masks")
    if not 0 <= options.least_score < 1:
        found.append(f"objective.least_score: found {options.least_score}, allowed: 0 to below 1")
    if recipe.input.pad % 32:
        found.append(f"input.pad: found {recipe.input.pad}, allowed: multiples of 32, the coarsest map's stride")
    held_out = any(source.val or source.test for source in recipe.data.sources.values())
    if recipe.zero.stage == 3 and held_out:
        found.append("zero.stage: found 3, allowed with held-out pictures: 0 to 2; ranks would take different numbers "
                     "of passes through sharded weights")  # fmt: skip
    return found + check_held_out(recipe, UNREAD)


def instance_warnings(recipe: TuneRecipe) -> list[str]:
    """List options that have no effect, or that are likely not meant."""
    return held_out_warnings(recipe)
