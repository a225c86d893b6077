"""Checks of a segmentation recipe."""

from finetune.recipe import TuneRecipe
from finetune.task_checks import Unread, check_held_out, held_out_warnings

#: Keys of classification that segmentation has nothing for.
UNREAD = Unread(
    evaluate=("clips", "crops", "average", "micro"), source=("sampling", "flip", "short_side", "stride")
)
#: Most classes: labels travel as 16 bits.
MOST_CLASSES = 32_767


def check_segmentation(recipe: TuneRecipe) -> list[str]:
    """List what can't work, beyond each component's own checks."""
    options, found = recipe.objective, []
    if not 2 <= recipe.model.classes <= MOST_CLASSES:
        found.append(f"model.classes: found {recipe.model.classes}, allowed: 2 to {MOST_CLASSES} classes")
    if recipe.compute.dtype != "fp32":
        found.append(f"compute.dtype: found {recipe.compute.dtype}, allowed: fp32; running statistics of the head's "
                     "batch norms lose small steps in 16 bits")  # fmt: skip
    if options.channels < 1:
        found.append(f"objective.channels: found {options.channels}, allowed: 1 or more")
    if options.auxiliary < 0:
        found.append(f"objective.auxiliary: found {options.auxiliary}, allowed: 0 (none) or more")
    if options.judge == "slide" and not 1 <= options.stride <= recipe.input.crop_size:
        found.append(
            f"objective.stride: found {options.stride}, allowed: 1 to input.crop_size={recipe.input.crop_size}, or "
            "windows would leave pixels out"
        )
    return found + check_held_out(recipe, UNREAD)


def segmentation_warnings(recipe: TuneRecipe) -> list[str]:
    """List options that have no effect, or that are likely not meant."""
    warnings = held_out_warnings(recipe)
    if recipe.objective.head == "linear" and recipe.objective.auxiliary != 0.4:
        warnings.append("objective.auxiliary has no effect: objective.head=linear has no auxiliary head")
    return warnings
