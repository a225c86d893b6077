"""Checks that recipes of several tasks share: judgement on held-out samples, and values that a task has nothing for."""

from dataclasses import dataclass
from typing import Any

import torch

from finetune.adapters.attach import tuning_problems
from finetune.adapters.config import check as check_tuning
from finetune.recipe import Evaluate, LabelledSource, Start, TuneRecipe
from pretrain.models.base import Architecture


@dataclass(frozen=True)
class Unread:
    """Keys of classification that another task has nothing for, by section."""

    evaluate: tuple[str, ...]
    source: tuple[str, ...]
    start: tuple[str, ...] = ("encoder_norm", "label_map")

    def values(self, recipe: TuneRecipe) -> list[str]:
        """List values that would be passed over without a word."""
        sections: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
            "evaluate": (recipe.evaluate, Evaluate(), self.evaluate),
            "start": (recipe.start, Start(), self.start),
        }
        for key, source in recipe.data.sources.items():
            sections[f"data.sources.{key}"] = (source, LabelledSource(shards=""), self.source)
        found = [
            f"{section}.{name}"
            for section, (given, plain, names) in sections.items()
            for name in names
            if getattr(given, name) != getattr(plain, name)
        ]
        return [f"{key}: has no effect with objective.name={recipe.objective.name}; remove it" for key in found]


def check_held_out(recipe: TuneRecipe, unread: Unread) -> list[str]:
    """List what can't work with any task that judges itself on held-out samples."""
    evaluate, problems = recipe.evaluate, []
    if recipe.ema.decay is not None and not 0 <= recipe.ema.decay <= 1:
        problems.append(f"ema.decay: found {recipe.ema.decay}, allowed: a share from 0 to 1")
    positive = {"evaluate.every_epochs": evaluate.every_epochs, "optim.layer_decay": recipe.optim.layer_decay}
    if "micro" not in unread.evaluate:
        positive["evaluate.micro"] = evaluate.micro
    problems += [f"{key}: found {value}, allowed: more than 0" for key, value in positive.items() if value <= 0]
    counts = {"workers", "pictures"} - {*unread.evaluate}
    problems += [f"evaluate.{name}: found {getattr(evaluate, name)}, allowed: 0 or more"
                 for name in sorted(counts) if getattr(evaluate, name) < 0]  # fmt: skip
    if evaluate.test == "best" and not any(source.val for source in recipe.data.sources.values()):
        problems.append("evaluate.test: best needs a validation; give data.sources.<name>.val, or evaluate.test=last")
    if recipe.health.shards is not None:
        problems.append("health.shards: for pre-training only; here data.sources.<name>.val is evaluated")
    return problems + unread.values(recipe)


def held_out_warnings(recipe: TuneRecipe) -> list[str]:
    """List options that have no effect, or that are likely not meant, with any such task."""
    warnings = []
    if recipe.run.init_weights is None:
        warnings.append("run.init_weights is null: the network starts from random weights; give pre-trained ones")
        if recipe.start != Start():
            warnings.append("start has no effect: run.init_weights is null")
    for name, source in recipe.data.sources.items():
        if source.val is None and source.test is None:
            warnings.append(f"data.sources.{name}: neither val nor test shards; nothing is measured on it")
    return warnings


def check_token_backbone(recipe: TuneRecipe, architecture: Architecture, takers: str, found: list[str]) -> list[str]:
    """List what can't work with a backbone whose tokens are used in the place of its pooled vector.

    Args:
        recipe: the run.
        architecture: of the backbone.
        takers: what uses the tokens, for messages.
        found: problems that are known already; they come first, and with any of them nothing is built.
    """
    if found := found + check_tuning(recipe.tune):
        return found
    with torch.device("meta"):
        found = tuning_problems(model := architecture.build(), recipe.tune)
    if any(name.startswith("fc_norm.") for name, _ in model.named_parameters()):
        # It would be without gradient.
        found.append(
            f"model.pooling: this one has an fc_norm behind a pooling that {takers} don't take; allowed: one with "
            "a norm of all tokens, token0 of classifier or class of image_vit"
        )
    return found
