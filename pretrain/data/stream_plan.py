"""Which positions a rank serves in which micro-batch, and where an epoch begins: the bookkeeping around the order."""

import functools
from dataclasses import dataclass

import numpy as np

from pretrain.data.index import ShardIndex, load_index
from pretrain.data.order import EpochOrder, Ints, SourceShape, epoch_quotas
from pretrain.errors import DataError, RecipeError
from pretrain.recipe.schema import Recipe, Source


@dataclass(frozen=True)
class OpenSource:
    """A source of the recipe with its index read, and its section of the recipe."""

    name: str
    index: ShardIndex
    options: Source

    @property
    def shape(self) -> SourceShape:
        """What the order needs."""
        return SourceShape(self.name, self.index.shards.samples, self.options.weight)


def open_sources(recipe: Recipe) -> list[OpenSource]:
    """Read the index of every source of the recipe, in its order.

    Raises:
        RecipeError: the recipe names no source.
        DataError: an index can't be read.
    """
    data = recipe.data
    if not data.sources:
        raise RecipeError("data.sources is empty: name at least one data set, for example data.sources.k400.shards=URL")
    return [
        OpenSource(name, load_index(source.shards, data.deadline_s), source) for name, source in data.sources.items()
    ]


class StreamPlan:
    """The order of all epochs, cut into optimiser steps and micro-batches.

    Args:
        recipe: The resolved recipe.
        sources: Its opened sources.

    Raises:
        DataError: an epoch has fewer samples than lanes, or than one optimiser step needs.
    """

    def __init__(self, recipe: Recipe, sources: list[OpenSource]) -> None:
        self.seed = recipe.run.seed
        self.samples, self.micro = recipe.batch.samples, recipe.batch.micro
        self._lanes, self._window = recipe.data.lanes, recipe.data.shuffle_window
        self._shapes = [source.shape for source in sources]
        self.quotas = epoch_quotas(self._shapes, recipe.data.epoch_samples)
        self.order = functools.lru_cache(maxsize=2)(self._order)
        self.steps_per_epoch = len(self.order(0)) // self.samples
        if self.steps_per_epoch == 0:
            raise DataError(
                f"an epoch of {sum(self.quotas)} samples in {self._lanes} lanes has {len(self.order(0))} positions, "
                f"batch.samples is {self.samples}: set batch.samples lower, data.lanes lower, or data.epoch_samples "
                "higher"
            )

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of one rank in one optimiser step."""
        served = self.micro * world_size
        if self.samples % served:
            below, above = self.samples // served * served, (self.samples // served + 1) * served
            raise RecipeError(
                f"batch.samples={self.samples} is not a multiple of batch.micro={self.micro} x {world_size} ranks; "
                f"the nearest multiple is {f'{below} or {above}' if below else above}"
            )
        return self.samples // served

    def positions(self, number: int, rank: int, world_size: int) -> tuple[int, Ints]:
        """Epoch, and positions in it, of a rank's micro-batch `number`, counted from the start of the training.

        Optimiser step t of an epoch covers the positions from t * samples on; neighbouring ones go to neighbouring
        ranks, so that a step is the same set of positions for any number of ranks.
        """
        step, part = divmod(number, self.accumulation(world_size))
        epoch, step = divmod(step, self.steps_per_epoch)
        slots = part * self.micro + np.arange(self.micro, dtype=np.int64)
        return epoch, step * self.samples + slots * world_size + rank

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self._shapes, self.quotas, self.seed, epoch, self._lanes, self._window)
