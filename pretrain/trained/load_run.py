"""A trained model, from whatever a user points at: a run, one of its checkpoints, or an export with its recipe."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.consolidate import consolidated_state, is_checkpoint, newest_checkpoint
from pretrain.checkpoint.restore import local_copy
from pretrain.errors import CheckpointError, WeightsError
from pretrain.models.averages import split_averages
from pretrain.models.weights import load_weights, read_raw
from pretrain.objectives.base import Objective
from pretrain.recipe.components import objective_file
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.runtime.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """An objective with trained weights (float32, on the CPU, in evaluation mode), its recipe, and its origin."""

    recipe: Recipe
    objective: Objective
    source: Path


def load_trained(path: str | Path) -> Trained:
    """Open a run folder (its newest checkpoint that verifies), a checkpoint, or an exported folder with recipe.yaml.

    A run that was uploaded, or a checkpoint of it, may be named by its URL.

    Raises:
        CheckpointError: nothing of that kind is there, or it does not verify.
        WeightsError: the weights don't fit the recipe.
    """
    source = find_trained(path)
    recipe = load_recipe(str(source / "recipe.yaml"))
    objective: Objective = objective_file(recipe).build(recipe)
    if is_checkpoint(source):
        load_checkpoint(objective, source)
    else:
        load_weights(objective.model, str(source))  # type: ignore[arg-type]
    return Trained(recipe, objective.eval(), source)


def find_trained(path: str | Path) -> Path:
    """The folder with weights and recipe.yaml that `path` means: of a run, its newest checkpoint that verifies.

    Raises:
        CheckpointError: nothing of that kind is there.
    """
    source = _source(path)
    if not (source / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path}: neither a run (with checkpoints/), nor a checkpoint, nor an export with its recipe.yaml"
        )
    return source


def read_weights(path: str, averaged: bool = True) -> dict[str, Tensor]:
    """The weights at `path`: a run of ours, one of its checkpoints, or a file or folder in any layout, any fsspec URL.

    Of a checkpoint only the model is taken, not what its objective holds beside it; its averages, where `averaged` and
    there are some, in place of what they are averages of.
    """
    source = _source(path)
    if not is_checkpoint(source):
        return read_raw(path)
    weights, averages = split_averages(consolidated_state(source))
    if averages:
        logger.info("%s has averaged weights; run.init_averaged=%s takes %s ones", path, str(averaged).lower(),
                    "the averaged" if averaged else "the live")  # fmt: skip
    return weights | averages if averaged else weights


def _source(path: str | Path) -> Path:
    """A run's newest checkpoint that verifies, fetched where it was uploaded; anything else is what it is."""
    place = local_copy(path)
    checkpoints = RunFolder(place).checkpoints
    return newest_checkpoint(checkpoints) if checkpoints.is_dir() else place


def load_checkpoint(objective: Objective, source: Path) -> None:
    """Put the weights of a checkpoint on the objective that its recipe builds.

    Raises:
        CheckpointError: it does not verify.
        WeightsError: the weights don't fit the recipe.
    """
    state = consolidated_state(source)
    outcome = objective.load_state_dict(state, strict=False)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise WeightsError(
            f"{source}: its weights don't fit its recipe; missing {outcome.missing_keys}, "
            f"unexpected {outcome.unexpected_keys}"
        )
