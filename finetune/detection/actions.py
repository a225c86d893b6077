"""Names of a run's actions, and which of them count: `classes.json` beside its shards."""

import logging
from pathlib import Path

from finetune.recipe import TuneRecipe
from pretrain.data.boxes.action_list import ActionList, make_action_list, read_action_list
from pretrain.errors import DataError
from pretrain.runtime import storage

logger = logging.getLogger(__name__)

#: Beside a data set's index, written by `launch/pack.py --task detection`; and beside exported weights.
CLASSES = "classes.json"


def action_list(recipe: TuneRecipe) -> ActionList:
    """Read the actions of a run's data sets, training and held-out ones; numbers where no set names them.

    Raises:
        DataError: the sets disagree, or have more or fewer classes than the model.
    """
    folders = {folder: None for source in recipe.data.sources.values()
               for folder in (source.shards, source.val, source.test) if folder}  # fmt: skip
    found = {folder: read_action_list(storage.join(folder, CLASSES)) for folder in folders
             if storage.exists(storage.join(folder, CLASSES))}  # fmt: skip
    if not found:
        logger.warning("no %s beside the shards (%s): actions are called by their numbers, and all of them count",
                       CLASSES, ", ".join(folders))  # fmt: skip
        return numbered_actions(recipe.model.classes)
    first, own = next(iter(found.items()))
    for folder, other in found.items():
        if (other.names, other.outputs, other.first) != (own.names, own.outputs, own.first):
            raise DataError(f"{folder}: {CLASSES} names other classes than {first} does; pack both with one --labels")
    if own.outputs != recipe.model.classes:
        raise DataError(
            f"{first}: {CLASSES} has {own.outputs} classes, but model.classes is {recipe.model.classes}; set "
            f"model.classes={own.outputs}"
        )
    return own


def numbered_actions(classes: int) -> ActionList:
    """Make a list for classes without names."""
    return make_action_list("model.classes", {number: f"class {number}" for number in range(1, classes + 1)})


def evaluated_outputs(actions: ActionList) -> list[int]:
    """List the outputs that count in the mean."""
    return [number - actions.first for number in sorted(actions.evaluated)]


def actions_of_weights(recipe: TuneRecipe, source: Path) -> ActionList:
    """Read the actions of trained weights: beside exported ones, else where the run has them from."""
    beside = source / CLASSES
    return read_action_list(str(beside)) if beside.is_file() else action_list(recipe)
