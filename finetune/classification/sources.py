"""The labelled sources of a recipe, resolved: what each says of its videos, with label maps read."""

from finetune.classification.labels import open_labels
from finetune.classification.views import SourceRules
from finetune.recipe import LabelledSource, TuneRecipe
from pretrain.errors import DataError


def source_rules(recipe: TuneRecipe) -> list[SourceRules]:
    """Rules of each source, in the recipe's order.

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
    data = recipe.data
    return SourceRules(
        labels=open_labels(source.labels, source.shards, recipe.model.classes, recipe.objective.task),
        sampling=source.sampling,
        stride=source.stride or data.stride,
        flip=source.flip,
        short_side=source.short_side or data.height,
    )
