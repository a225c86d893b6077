"""Checks of a detection recipe."""

from finetune.recipe import TuneRecipe
from finetune.task_checks import Unread, check_held_out

#: Keys of classification that detection has nothing for.
UNREAD = Unread(
    evaluate=("clips", "crops", "average", "pictures"), source=("labels", "sampling", "flip", "short_side")
)
FOCAL_CLASSES = 80


def check_detection(recipe: TuneRecipe) -> list[str]:
    """List what can't work, beyond each component's own checks."""
    objective, model = recipe.objective, recipe.model
    problems = []
    if model.classes < 1:
        problems.append(f"model.classes: found {model.classes}, allowed: 1 or more actions")
    if objective.loss == "focal" and model.classes != FOCAL_CLASSES:
        problems.append(f"objective.loss=focal: model.classes={model.classes}; it is of AVA's {FOCAL_CLASSES} outputs")
    if any(one <= -1 for one in objective.extension):
        problems.append(f"objective.extension: found {list(objective.extension)}, allowed: more than -1 each")
    return problems + check_given_boxes(recipe) + check_judging(recipe)


def check_given_boxes(recipe: TuneRecipe) -> list[str]:
    """List what can't work with any task that is given the boxes of its persons."""
    if recipe.input.empty == "refuse":
        return []
    return [
        f"input.empty: found {recipe.input.empty}, allowed: refuse; without a person objective.name="
        f"{recipe.objective.name} has nothing to learn from a keyframe"
    ]


def check_judging(recipe: TuneRecipe) -> list[str]:
    """List what can't work with any task whose answers are boxes with actions."""
    return check_held_out(recipe, UNREAD)
