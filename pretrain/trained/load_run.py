"""A trained model, from whatever a user points at: a run, one of its checkpoints, or an export with its recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.consolidate import consolidated_state, is_checkpoint
from pretrain.errors import CheckpointError, RecipeError, WeightsError
from pretrain.models.initial_weights import weights_source
from pretrain.models.weights import not_finite
from pretrain.objectives.base import Method, Objective, method_of
from pretrain.recipe.files import program_of
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import PRETRAINING, Recipe


@dataclass(frozen=True)
class Trained:
    """An objective with trained weights (float32, on the CPU, in evaluation mode), its method, and its origin.

    The weights are those that its run evaluates: averages where it has some.
    """

    method: Method
    objective: Objective
    source: Path

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        recipe: Recipe = self.method.recipe
        return recipe


def load_trained(path: str | Path, programs: Mapping[str, type[Recipe]] = PRETRAINING) -> Trained:
    """Open a run folder (its newest checkpoint that verifies), a checkpoint, or an exported folder with recipe.yaml.

    A run that was uploaded, or a checkpoint of it, may be named by its URL.

    Args:
        path: of the run.
        programs: kinds of recipe that are known, by program.

    Raises:
        CheckpointError: nothing of that kind is there, or it does not verify.
        WeightsError: the weights don't fit the recipe.
    """
    source = find_trained(path)
    method = method_of(load_stored_recipe(source / "recipe.yaml", programs))
    objective = method.build()
    if is_checkpoint(source):
        load_checkpoint(objective, source)
        # The averages, where there are some: the live weights are not what the run was judged by.
        objective.keep_evaluated_weights()
    else:
        method.take_export(objective, source)
    return Trained(method, objective.eval(), source)


def load_stored_recipe(path: Path, programs: Mapping[str, type[Recipe]] = PRETRAINING) -> Recipe:
    """Load the recipe that a run or an export keeps, of the kind that it says itself.

    Raises:
        RecipeError: of another program than the known ones.
    """
    program = program_of(path)
    # Not guessed from its keys: read as the wrong kind, every section would be wrong, which is not the reason.
    if program is None or program not in programs:
        raise RecipeError(
            f"{path}: program: found {program!r}, allowed here: {', '.join(programs)}. A recipe stored before programs "
            "stood in them needs the line `program: pretrain` or `program: finetune`"
        )
    return load_recipe(str(path), schema=programs[program])


def find_trained(path: str | Path) -> Path:
    """Find the folder with weights and recipe.yaml that `path` means: of a run, its newest checkpoint that verifies.

    Raises:
        CheckpointError: nothing of that kind is there.
    """
    source = weights_source(path)
    if not (source / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path}: neither a run (with checkpoints/), nor a checkpoint, nor an export with its recipe.yaml"
        )
    return source


def load_checkpoint(objective: Objective, source: Path, finite: bool = True) -> None:
    """Put the weights of a checkpoint on the objective that its recipe builds.

    Args:
        objective: that takes them.
        source: the checkpoint.
        finite: refuse weights that are not; False: to look for where they come from.

    Raises:
        CheckpointError: it does not verify.
        WeightsError: the weights don't fit the recipe, or are not finite.
    """
    state = consolidated_state(source)
    learnt = {name: state[name] for name, _ in objective.named_parameters() if name in state}
    if finite and (broken := not_finite(learnt)):
        raise WeightsError(
            f"{source}: {len(broken)} of {len(learnt)} weights are not finite: {', '.join(broken[:5])}; the run went "
            "wrong before this checkpoint: take an earlier one (RUN/checkpoints, guard in RUN/metrics.jsonl)"
        )
    # Not strict: torch's own error would name neither the file nor both lists of keys in one line.
    outcome = objective.load_state_dict(state, strict=False)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise WeightsError(
            f"{source}: its weights don't fit its recipe; missing {outcome.missing_keys}, "
            f"unexpected {outcome.unexpected_keys}"
        )
