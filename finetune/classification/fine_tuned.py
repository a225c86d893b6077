"""A fine-tuned model with the names of its classes: of a run, one of its checkpoints, or an export with its recipe."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune.adapters.attach import merge
from finetune.adapters.config import Tune
from finetune.classification.label_sources import source_rules
from finetune.classification.labels import LabelMap, class_names, read_names
from finetune.classification.predictions import INFO
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.checkpoint.consolidate import is_checkpoint
from pretrain.errors import TubeletError, WeightsError
from pretrain.models.classifier_weights import classifier_state
from pretrain.models.weights import LoadReport, load_state, read_state
from pretrain.recipe.components import objective_file
from pretrain.trained.load_run import find_trained, load_checkpoint
from pretrain.trained.model_card import run_of

logger = logging.getLogger(__name__)

#: Class names beside exported weights, one a line.
NAMES = "classes.txt"


@dataclass(frozen=True)
class FineTuned:
    """A task with the weights that its run evaluates, averages where it has some: float32, CPU, evaluation mode."""

    recipe: TuneRecipe
    objective: Any
    names: list[str]
    source: Path

    @property
    def model(self) -> Any:
        """The classifier."""
        return self.objective.model


def is_fine_tuned(path: str | Path) -> bool:
    """Whether the recipe beside the weights is one of fine-tuning, which alone has the section `tune`.

    Raises:
        CheckpointError: no weights with a recipe there.
    """
    text = (find_trained(path) / "recipe.yaml").read_text(encoding="utf-8")
    return "tune" in (yaml.safe_load(text) or {})


def load_fine_tuned(path: str | Path) -> FineTuned:
    """Open a fine-tuning run (its newest checkpoint that verifies), a checkpoint, or an exported folder.

    Raises:
        CheckpointError: nothing of that kind is there, or it does not verify.
        WeightsError: pre-trained weights, or weights that don't fit the recipe.
    """
    source = find_trained(path)
    if not is_fine_tuned(source):
        raise WeightsError(
            f"{path}: pre-trained weights, which have no classifier; fine-tune them: "
            f"python launch/finetune.py --recipe RECIPE run.init_weights={path}"
        )
    recipe = load_tune_recipe(str(source / "recipe.yaml"))
    objective = objective_file(recipe).build(recipe)
    if is_checkpoint(source):
        load_checkpoint(objective, source)
        _take_averages(objective)
    else:
        state = classifier_state(read_state(str(source)))
        load_state(objective.model, state, LoadReport(str(source), "export"))
        objective.average = None
    return FineTuned(recipe, objective.eval(), _names(recipe, source), source)


def merged(tuned: FineTuned) -> FineTuned:
    """The same function with low-rank updates added to their weights; its recipe then says method full.

    Raises:
        RecipeError: there are none, or parts that no weight can take up.
    """
    merge(tuned.model)
    return replace(tuned, recipe=replace(tuned.recipe, tune=Tune()))


def with_keep_rate(tuned: FineTuned, rate: float) -> FineTuned:
    """The same weights with another share of tokens kept in the dropping blocks (EViT); 1: all.

    Raises:
        RecipeError: not above 0 and at most 1.
    """
    tokens = replace(tuned.recipe.model.tokens, keep_rate=rate)
    tuned.model.reorganise(tokens)
    return replace(tuned, recipe=replace(tuned.recipe, model=replace(tuned.recipe.model, tokens=tokens)))


def label_map(tuned: FineTuned) -> LabelMap:
    """The task's labels, for code that reads samples."""
    return LabelMap(tuned.recipe.model.classes, tuple(tuned.names), tuned.recipe.objective.task)


def _take_averages(objective: Any) -> None:
    """Averages become the weights, as they are what is evaluated and tested."""
    with objective.evaluated_weights():
        state = {name: value.clone() for name, value in objective.model.state_dict().items()}
    objective.model.load_state_dict(state)
    objective.average = None


def _names(recipe: TuneRecipe, source: Path) -> list[str]:
    """From beside the weights, else from the run's test, else from the shards."""
    if (source / NAMES).is_file():
        return list(read_names(str(source / NAMES)))
    root = run_of(source)
    for note in sorted(root.glob(f"predictions/*/{INFO}")) if root else []:
        names: list[str] = json.loads(note.read_text(encoding="utf-8"))["classes"]
        return names
    try:
        return list(class_names(source_rules(recipe)[0].labels))
    except TubeletError as error:
        logger.warning("class names can't be read, so classes are called by their numbers (%s)", error)
        return [str(number) for number in range(recipe.model.classes)]
