"""Bookkeeping around the order: the positions that a rank serves in each micro-batch, and where an epoch begins."""

from dataclasses import dataclass

from pretrain.data.compose import compose, slots_of
from pretrain.data.index import ShardIndex, load_index
from pretrain.data.motion_tables import MotionIndex, load_motion_index
from pretrain.data.order import SourceShape
from pretrain.data.samples import Place
from pretrain.errors import DataError, RecipeError
from pretrain.recipe.schema import Batch, Data, Source


@dataclass(frozen=True)
class OpenSource:
    """A source of the recipe with its index read, and its section of the recipe."""

    name: str
    index: ShardIndex
    options: Source
    motion: MotionIndex | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the data, and of the motion curves by which its frames are chosen."""
        # Other curves are other clips of the same videos: a run must not go on with them unnoticed.
        return self.index.fingerprint + (f", motion {self.motion.fingerprint}" if self.motion else "")

    @property
    def shape(self) -> SourceShape:
        """The source as the order sees it."""
        return SourceShape(self.name, self.index.shards.samples, self.options.weight)


def open_sources(data: Data) -> list[OpenSource]:
    """Read the index of every source of a recipe's section, in its order.

    Raises:
        RecipeError: the recipe names no source.
        DataError: an index can't be read.
    """
    if not data.sources:
        raise RecipeError("data.sources is empty: name at least one data set, for example data.sources.k400.shards=URL")
    return [_open(name, source, data.deadline_s) for name, source in data.sources.items()]


def _open(name: str, source: Source, deadline_s: float) -> OpenSource:
    index = load_index(source.shards, deadline_s)
    return OpenSource(name, index, source, load_motion_index(index, deadline_s) if source.needs_motion else None)


class StreamPlan:
    """The order of all epochs, cut into optimiser steps and micro-batches.

    Args:
        data: The recipe's section.
        batch: The recipe's section.
        seed: The recipe's run.seed.
        sources: `open_sources(data)`.

    Raises:
        DataError: an epoch has fewer samples than lanes, or than one optimiser step needs.
    """

    def __init__(self, data: Data, batch: Batch, seed: int, sources: list[OpenSource]) -> None:
        self.data, self.sources = data, sources
        self.samples, self.micro = batch.samples, batch.micro
        self._made_of = (data, batch, seed, sources)
        self.composition = compose(data, [source.shape for source in sources], batch.samples, seed)
        self.steps_per_epoch = self.composition.steps_per_epoch
        # Told here: the first division by it would fail inside a data worker, without a key of the recipe.
        if self.steps_per_epoch == 0:
            raise DataError(
                f"an epoch has {self.composition.positions} positions in {data.lanes} lanes, batch.samples is "
                f"{self.samples}: set batch.samples lower, data.lanes lower, or data.epoch_samples higher"
            )

    def __reduce__(self) -> tuple[type["StreamPlan"], tuple[Data, Batch, int, list[OpenSource]]]:
        # An epoch's order is a cached function, which pickle refuses: a data worker draws it anew.
        return StreamPlan, self._made_of

    def accumulation(self, world_size: int) -> int:
        """Count the micro-batches of one rank in one optimiser step."""
        served = self.micro * world_size
        # Not rounded to what fits: batch.samples scales the learning rate and decides which samples make a step.
        if self.samples % served:
            below, above = self.samples // served * served, (self.samples // served + 1) * served
            raise RecipeError(
                f"batch.samples={self.samples} is not a multiple of batch.micro={self.micro} x {world_size} ranks; "
                f"the nearest multiple is {f'{below} or {above}' if below else above}"
            )
        return self.samples // served

    def places(self, number: int, rank: int, world_size: int, in_blocks: bool = False) -> list[Place]:
        """Locate the samples of a rank's micro-batch `number`, counted from the start of the training.

        With `in_blocks` as `Samples.in_blocks` says.
        """
        step, part = divmod(number, self.accumulation(world_size))
        return self.composition.places(step, slots_of(part, self.micro, rank, world_size, in_blocks))

    @property
    def samples_per_micro(self) -> int:
        """Samples of one micro-batch of a rank."""
        return self.micro * self.composition.places_per_slot


def open_plan(data: Data, batch: Batch, seed: int) -> StreamPlan:
    """Read the indices of a recipe's sources and lay out their order; `seed` is run.seed. Errors as of both."""
    return StreamPlan(data, batch, seed, open_sources(data))
