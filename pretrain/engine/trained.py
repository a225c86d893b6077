"""A trained model, from whatever a user points at: a run, one of its checkpoints, or an export with its recipe."""

from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.consolidate import consolidated_state, is_checkpoint, newest_checkpoint
from pretrain.errors import CheckpointError, WeightsError
from pretrain.models.weights import load_weights
from pretrain.objectives.base import Objective
from pretrain.recipe.components import load_component
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Trained:
    """An objective with trained weights (float32, on the CPU, in evaluation mode), its recipe, and its origin."""

    recipe: Recipe
    objective: Objective
    source: Path


def load_trained(path: Path) -> Trained:
    """Open a run folder (its newest checkpoint that verifies), a checkpoint, or an exported folder with recipe.yaml.

    Raises:
        CheckpointError: nothing of that kind is there, or it does not verify.
        WeightsError: the weights don't fit the recipe.
    """
    source = newest_checkpoint(path / "checkpoints") if (path / "checkpoints").is_dir() else path
    if not (source / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path}: neither a run (with checkpoints/), nor a checkpoint, nor an export with its recipe.yaml"
        )
    recipe = load_recipe(str(source / "recipe.yaml"))
    objective: Objective = load_component("objectives", recipe.objective.name).build(recipe)
    if is_checkpoint(source):
        _load_checkpoint(objective, source)
    else:
        load_weights(objective.model, str(source))  # type: ignore[arg-type]
    return Trained(recipe, objective.eval(), source)


def _load_checkpoint(objective: Objective, source: Path) -> None:
    state = consolidated_state(source)
    outcome = objective.load_state_dict(state, strict=False)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise WeightsError(
            f"{source}: its weights don't fit its recipe; missing {outcome.missing_keys}, "
            f"unexpected {outcome.unexpected_keys}"
        )
