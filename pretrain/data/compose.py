"""Ways of sources to share steps (`data.compose`): mixed in each batch, a step of each in turn, or side by side.

All three are arithmetic on the order of an epoch (order.py): which samples make step t follows from (seed, t) alone, so
ranks, workers and resumes change nothing.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pretrain.data.order import EpochOrder, Ints, SourceShape, check_lanes, epoch_quotas
from pretrain.data.samples import Place
from pretrain.recipe.schema import Data


class Composition(ABC):
    """Rule that says which samples make an optimiser step.

    Attributes:
        steps_per_epoch: optimiser steps of one pass.
        positions: positions of one epoch, of all sources.
        places_per_slot: samples that a slot of the batch holds.
    """

    steps_per_epoch: int
    positions: int
    places_per_slot: int = 1

    @abstractmethod
    def places(self, step: int, slots: Ints) -> list[Place]:
        """Locate the samples of some slots, each in [0, batch.samples), of optimiser step `step` over all epochs."""

    @abstractmethod
    def order_of(self, place: Place) -> EpochOrder:
        """Give the order that a place is of; it knows the substitutes."""

    @abstractmethod
    def step_of(self, epoch: int, position: int) -> int:
        """Give the optimiser step over all epochs that a position of an epoch belongs to."""

    def source_of(self, step: int) -> int | None:
        """Give the one source that a step is made of; None where it has all."""
        return None


class Mixed(Composition):
    """All sources in one line: a batch holds samples of each, by weight or size.

    Args:
        shapes: the sources, in the recipe's order.
        quotas: samples of each in an epoch.
        data: the recipe's section: lanes, window.
        samples: of a step.
        seed: run.seed.
        key: of its order among others; see `EpochOrder`.
    """

    def __init__(
        self,
        shapes: list[SourceShape],
        quotas: list[int],
        data: Data,
        samples: int,
        seed: int,
        key: tuple[str, ...] = (),
    ) -> None:
        self._samples = samples

        def order(epoch: int) -> EpochOrder:
            return EpochOrder(shapes, quotas, seed, epoch, data.lanes, data.shuffle_window, key)

        # Two: a worker's read-ahead may be in the next epoch already.
        self.order = functools.lru_cache(maxsize=2)(order)
        self.positions = len(self.order(0))
        # Whole steps only: one that took from two epochs would have two orders.
        self.steps_per_epoch = self.positions // self._samples

    def places(self, step: int, slots: Ints) -> list[Place]:
        epoch, step = divmod(step, self.steps_per_epoch)
        positions = step * self._samples + slots
        location = self.order(epoch).locate(positions)
        columns = (positions.tolist(), location.source.tolist(), location.shard.tolist(), location.row.tolist())
        return [
            Place(epoch, position, source, shard, row) for position, source, shard, row in zip(*columns, strict=True)
        ]

    def order_of(self, place: Place) -> EpochOrder:
        return self.order(place.epoch)

    def step_of(self, epoch: int, position: int) -> int:
        return epoch * self.steps_per_epoch + position // self._samples


class _Apart(Composition):
    """Each source with an order of its own, all of the same length: smaller ones begin again."""

    def __init__(self, shapes: list[SourceShape], quota: int, data: Data, samples: int, seed: int) -> None:
        count = len(shapes)
        check_lanes(quota, data.lanes, _turns(data, count))
        # The others take part with a quota of 0: a place's source stays the number that it has in the recipe.
        self._each = [
            # Keyed by name: else all would draw one permutation, and the same samples would meet in every epoch.
            Mixed(shapes, [quota if own == source else 0 for own in range(count)], data, samples, seed, (shape.name,))
            for source, shape in enumerate(shapes)
        ]
        self.positions = count * self._each[0].positions

    def order_of(self, place: Place) -> EpochOrder:
        return self._each[place.source].order(place.epoch)

    def _of(self, source: int, step: int, slots: Ints) -> list[Place]:
        """Locate samples of one source, under positions that no other source has: what is random is keyed by them."""
        places, count = self._each[source].places(step, slots), len(self._each)
        return [replace(place, position=place.position * count + source) for place in places]


class Alternate(_Apart):
    """A step of each source in turn."""

    def __init__(self, shapes: list[SourceShape], quota: int, data: Data, samples: int, seed: int) -> None:
        super().__init__(shapes, quota, data, samples, seed)
        self.steps_per_epoch = len(shapes) * self._each[0].steps_per_epoch

    def places(self, step: int, slots: Ints) -> list[Place]:
        own, source = divmod(step, len(self._each))
        return self._of(source, own, slots)

    def step_of(self, epoch: int, position: int) -> int:
        position, source = divmod(position, len(self._each))
        return self._each[source].step_of(epoch, position) * len(self._each) + source

    def source_of(self, step: int) -> int:
        return step % len(self._each)


class Together(_Apart):
    """A sample of each source side by side: a micro-batch holds those of the first source, then the second's, ..."""

    def __init__(self, shapes: list[SourceShape], quota: int, data: Data, samples: int, seed: int) -> None:
        super().__init__(shapes, quota, data, samples, seed)
        self.steps_per_epoch = self._each[0].steps_per_epoch
        self.places_per_slot = len(shapes)

    def places(self, step: int, slots: Ints) -> list[Place]:
        return [place for source in range(len(self._each)) for place in self._of(source, step, slots)]

    def step_of(self, epoch: int, position: int) -> int:
        return self._each[0].step_of(epoch, position // len(self._each))


def compose(data: Data, shapes: list[SourceShape], samples: int, seed: int) -> Composition:
    """Build the recipe's composition.

    Args:
        data: section of the recipe.
        shapes: the sources, in the recipe's order.
        samples: batch.samples, those of a step.
        seed: run.seed.

    Raises:
        DataError: a source is empty, or an epoch has fewer samples than lanes.
        RecipeError: weights are missing or not positive.
    """
    quotas = shares(data, shapes)
    if data.compose == "mixed":
        return Mixed(shapes, quotas, data, samples, seed)
    return {"alternate": Alternate, "together": Together}[data.compose](shapes, quotas[0], data, samples, seed)


def shares(data: Data, shapes: list[SourceShape]) -> list[int]:
    """Count the samples that each source gives to an epoch. Errors as for `compose`."""
    if data.compose == "mixed":
        return epoch_quotas(shapes, data.epoch_samples)
    sizes = epoch_quotas(shapes, None)
    return [_quota(data, sizes)] * len(shapes)


def epoch_size(data: Data, sizes: Sequence[int], samples: int) -> tuple[int, int]:
    """Count the samples and the optimiser steps of an epoch, from the sizes of the sources alone.

    Lanes have equal length, so up to data.lanes - 1 samples are not served.
    """
    if data.compose == "mixed":
        served = (data.epoch_samples or sum(sizes)) // data.lanes * data.lanes
        return served, served // samples
    served = _quota(data, sizes) // data.lanes * data.lanes
    return served * len(sizes), served // samples * _turns(data, len(sizes))


def _quota(data: Data, sizes: Sequence[int]) -> int:
    """Count the samples of each source in an epoch where sources are kept apart: as many as the largest has."""
    if data.epoch_samples is None:
        return max(sizes)
    return data.epoch_samples // _turns(data, len(sizes))


def _turns(data: Data, sources: int) -> int:
    """Count the sources that take turns, and share data.epoch_samples."""
    return sources if data.compose == "alternate" else 1


def slots_of(part: int, micro: int, rank: int, world_size: int, in_blocks: bool = False) -> Ints:
    """Number the slots of a rank's micro-batch `part` in a step, which is the same samples for any number of ranks.

    Neighbouring slots go to neighbouring ranks, or with `in_blocks` to one micro-batch, which then is the same samples
    for any number of ranks too.
    """
    if in_blocks:
        return (part * world_size + rank) * micro + np.arange(micro, dtype=np.int64)
    return (part * micro + np.arange(micro, dtype=np.int64)) * world_size + rank
