"""Labelled sources of a recipe, resolved: what each says of its videos, with label maps read."""

from collections import Counter

from finetune.classification.labels import LabelMap, imbalance_report, known_counts, open_labels
from finetune.classification.recipe_checks import sided_classes
from finetune.classification.views import SourceRules
from finetune.recipe import LabelledSource, TuneRecipe
from pretrain.errors import DataError, SampleError


def source_rules(recipe: TuneRecipe) -> list[SourceRules]:
    """Resolve the rules of each source, in the recipe's order.

    Raises:
        DataError: label maps can't be read, or sources number their classes differently.
    """
    rules = [_rules(recipe, name, source) for name, source in recipe.data.sources.items()]
    maps = {one.labels.names for one in rules if one.labels.names}
    if len(maps) > 1:
        raise DataError(
            "data.sources: the class names of the sources differ, so the same output would mean different classes; "
            "give all of them one list of names (data.sources.<name>.labels)"
        )
    return rules


def _rules(recipe: TuneRecipe, name: str, source: LabelledSource) -> SourceRules:
    clip = recipe.input
    labels = open_labels(source.labels, source.shards, recipe.model.classes, recipe.objective.task)
    return SourceRules(
        labels=labels,
        choice=clip.frame_choice(source.sampling, source.stride),
        flip=source.flip,
        short_side=source.short_side or clip.evaluated_side,
        geometry=clip.GEOMETRY,
        picture_filter=clip.evaluated_filter,
        mirrored=mirrored_classes(name, source.flip_labels, labels) if source.flip_labels else None,
    )


def mirrored_classes(name: str, pairs: list[list[str]], labels: LabelMap) -> tuple[int, ...]:
    """Resolve a source's `flip_labels`: the class of a mirrored clip of each class.

    Raises:
        DataError: no pairs, no such classes, or a class in two pairs.
    """
    key, exchange = f"data.sources.{name}.flip_labels", list(range(labels.classes))
    for pair in pairs:
        if len(pair) != 2:
            raise DataError(f"{key}: found {pair}, allowed: pairs of classes such as [86, 87]")
        try:
            one, other = (labels.number(label) for label in pair)
        except SampleError as error:
            raise DataError(f"{key}: {pair}: {error.detail}") from error
        if one == other or exchange[one] != one or exchange[other] != other:
            raise DataError(f"{key}: {pair}: a class is in two pairs, allowed: each class once")
        exchange[one], exchange[other] = other, one
    return tuple(exchange)


def label_report(recipe: TuneRecipe, rules: list[SourceRules]) -> list[str]:
    """Report how even the classes of each source are, where counted, and flips that contradict class names."""
    lines = []
    for (name, source), rule in zip(recipe.data.sources.items(), rules, strict=True):
        counts = known_counts(source.shards) if recipe.objective.task != "regression" else None
        lines += [f"data.sources.{name}: {line}" for line in imbalance_report(counts or Counter())]
        sided = sided_classes(_kept_names(rule)) if rule.flip else []
        if sided:
            lines.append(f"data.sources.{name}.flip=true, but classes tell left from right: {', '.join(sided[:5])}")
    return lines


def _kept_names(rule: SourceRules) -> tuple[str, ...]:
    """Name the classes that mirrored clips stay in."""
    mirrored = rule.mirrored or range(rule.labels.classes)
    return tuple(name for number, name in enumerate(rule.labels.names) if mirrored[number] == number)
