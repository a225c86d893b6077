"""Labelled sources of a recipe, resolved: what each says of its videos, with label maps read."""

from collections import Counter

from finetune.classification.labels import imbalance_report, known_counts, open_labels
from finetune.classification.recipe_checks import sided_classes
from finetune.classification.views import SourceRules
from finetune.recipe import LabelledSource, TuneRecipe
from pretrain.errors import DataError


def source_rules(recipe: TuneRecipe) -> list[SourceRules]:
    """Resolve the rules of each source, in the recipe's order.

    Raises:
        DataError: label maps can't be read, or sources number their classes differently.
    """
    rules = [_rules(recipe, source) for source in recipe.data.sources.values()]
    maps = {one.labels.names for one in rules if one.labels.names}
    if len(maps) > 1:
        raise DataError(
            "data.sources: the class names of the sources differ, so the same output would mean different classes; "
            "give all of them one list of names (data.sources.<name>.labels)"
        )
    return rules


def _rules(recipe: TuneRecipe, source: LabelledSource) -> SourceRules:
    clip = recipe.input
    return SourceRules(
        labels=open_labels(source.labels, source.shards, recipe.model.classes, recipe.objective.task),
        choice=clip.frame_choice(source.sampling, source.stride),
        flip=source.flip,
        short_side=source.short_side or clip.height,
    )


def label_report(recipe: TuneRecipe, rules: list[SourceRules]) -> list[str]:
    """Report how even the classes of each source are, where counted, and flips that contradict class names."""
    lines = []
    for (name, source), rule in zip(recipe.data.sources.items(), rules, strict=True):
        counts = known_counts(source.shards) if recipe.objective.task != "regression" else None
        lines += [f"data.sources.{name}: {line}" for line in imbalance_report(counts or Counter())]
        sided = sided_classes(rule.labels.names) if rule.flip else []
        if sided:
            lines.append(f"data.sources.{name}.flip=true, but classes tell left from right: {', '.join(sided[:5])}")
    return lines
