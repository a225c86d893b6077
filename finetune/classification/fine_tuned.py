"""Fine-tuned classifier with the names of its classes: of a run, one of its checkpoints, or an export."""

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from finetune.classification.label_sources import source_rules
from finetune.classification.labels import LabelMap, class_names, read_names
from finetune.classification.predictions import INFO
from finetune.recipe import PROGRAMS, TuneRecipe
from pretrain.checkpoint.folders import run_of
from pretrain.errors import RecipeError, TubeletError, WeightsError
from pretrain.models.backbone import Backbone
from pretrain.recipe.files import program_of
from pretrain.recipe.schema import Recipe
from pretrain.runtime.untrusted import parse_json
from pretrain.trained.load_run import Trained, find_trained, load_trained

logger = logging.getLogger(__name__)

#: Class names beside exported weights, one a line.
NAMES = "classes.txt"


@dataclass(frozen=True)
class FineTuned:
    """Classifier with the weights that its run evaluates: float32, on the CPU, in evaluation mode."""

    recipe: TuneRecipe
    objective: Any
    names: list[str]
    source: Path

    @property
    def model(self) -> Any:
        """The classifier."""
        return self.objective.model


def load_fine_tuned(path: str | Path) -> FineTuned:
    """Open a fine-tuning run (its newest checkpoint that verifies), a checkpoint, or an exported folder.

    Raises:
        CheckpointError: nothing of that kind is there, or it does not verify.
        WeightsError: weights of pre-training or of another task, or weights that don't fit the recipe.
    """
    from finetune.classification.task import ClassificationTask  # here, because it imports this module

    trained = load_task(path)
    if not isinstance(trained.method, ClassificationTask):
        raise WeightsError(f"{path}: objective {trained.recipe.objective.name} is no classification")
    recipe = trained.method.recipe
    return FineTuned(recipe, trained.objective, names_of(recipe, trained.source), trained.source)


def load_task(path: str | Path) -> Trained:
    """Open what a fine-tuning task has trained, as `load_fine_tuned`, of any task.

    Raises:
        CheckpointError: nothing of that kind is there, or it does not verify.
        WeightsError: pre-trained weights, or weights that don't fit the recipe.
    """
    source = find_trained(path)
    # Before the weights are read: those of pre-training may be large, or in a layout that only starts a run.
    if program_of(source / "recipe.yaml") == Recipe.program:
        raise WeightsError(
            f"{path}: pre-trained weights, which have no classifier; fine-tune them: "
            f"python launch/finetune.py --recipe RECIPE run.init_weights={path}"
        )
    return load_trained(source, PROGRAMS)


def set_keep_rate(trained: Trained, rate: float) -> None:
    """Keep another share of tokens in the dropping blocks (EViT), with the same weights; 1: all.

    Raises:
        RecipeError: not above 0 and at most 1, or a model that drops none.
    """
    model, options = trained.objective.model, trained.recipe.model
    if not isinstance(model, Backbone) or "tokens" not in {field.name for field in fields(options)}:
        raise RecipeError(f"--keep-rate: model.name={options.name} has no section `tokens`, so it can't drop any")
    model.reorganise(replace(options.tokens, keep_rate=rate))


def label_map(tuned: FineTuned) -> LabelMap:
    """Give the task's labels, for code that reads samples."""
    return LabelMap(tuned.recipe.model.classes, tuple(tuned.names), tuned.recipe.objective.task)


def names_of(recipe: TuneRecipe, source: Path) -> list[str]:
    """Read the class names from beside the weights, else from the run's test, else from the shards."""
    if (source / NAMES).is_file():
        return list(read_names(str(source / NAMES)))
    root = run_of(source)
    # Any test will do: class names are the run's, whatever checkpoint was tested.
    for note in sorted(root.glob(f"predictions/*/{INFO}")) if root else []:
        names: list[str] = parse_json(note.read_text(encoding="utf-8"))["classes"]
        return names
    try:
        return list(class_names(source_rules(recipe)[0].labels))
    # A model is used where the shards of its training are not, or no longer.
    except TubeletError as error:
        logger.warning("class names can't be read, so classes are called by their numbers (%s)", error)
        return [str(number) for number in range(recipe.model.classes)]
