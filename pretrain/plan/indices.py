"""A recipe's data as far as it is there, before anything is trained."""

from concurrent.futures import ThreadPoolExecutor

from pretrain.data.compose import epoch_size
from pretrain.data.index import ShardIndex, load_index
from pretrain.errors import DataError
from pretrain.recipe.schema import Recipe, Source

#: Longest time that the search for one source's index may take: a dry run answers in seconds.
INDEX_DEADLINE_S = 10.0


def find_indices(recipe: Recipe) -> tuple[dict[str, ShardIndex | None], dict[str, DataError]]:
    """Read the index of every source; None where there is none that can be used, and the errors of those."""
    indices: dict[str, ShardIndex | None] = {}
    errors: dict[str, DataError] = {}
    # At once, since each source that does not answer takes the whole deadline.
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = pool.map(_index_or_error, [source.shards for source in recipe.data.sources.values()])
    for name, index in zip(recipe.data.sources, found, strict=True):
        indices[name] = index if isinstance(index, ShardIndex) else None
        if isinstance(index, DataError):
            errors[name] = index
    return indices, errors


def _index_or_error(url: str) -> ShardIndex | DataError:
    try:
        return load_index(url, deadline_s=INDEX_DEADLINE_S)
    except DataError as error:
        return error


def epoch_of(recipe: Recipe, indices: dict[str, ShardIndex | None]) -> tuple[int, int] | None:
    """Count the samples that an epoch serves, and its optimiser steps. None while a source's size is unknown."""
    sizes = [source_size(source, indices[name]) for name, source in recipe.data.sources.items()]
    if not all(sizes) and (recipe.data.epoch_samples is None or recipe.data.compose != "mixed"):
        return None
    return epoch_size(recipe.data, [size or 0 for size in sizes], recipe.batch.samples)


def source_size(source: Source, index: ShardIndex | None) -> int | None:
    """Count the videos of a source: those of its index, else those that the recipe expects."""
    return index.samples if index else source.expected_samples
