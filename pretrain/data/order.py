"""The order of an epoch as arithmetic: position -> (source, shard, row), for any number of ranks and workers.

An epoch is one line of samples: every (source, pass, shard) unit that the epoch uses, permuted. The line is cut into
`lanes` equal lanes; inside a lane, neighbouring samples are shuffled window by window. Position p of the epoch is step
p // lanes of lane p % lanes. Nothing here knows how many ranks or workers serve the positions, and nothing has the size
of the data set: memory grows with the number of shards, so 100 million samples cost a few megabytes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.randomness import generator, key_of
from pretrain.errors import DataError, RecipeError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SourceShape:
    """A source as the order sees it: its name, the samples of each shard, its weight in the mix."""

    name: str
    counts: Ints
    weight: float | None = None

    @property
    def samples(self) -> int:
        """Samples of the whole source."""
        return int(self.counts.sum())


class Location(NamedTuple):
    """Places of samples, one entry a sample: indices of source, shard and row in the shard; pass over the source."""

    source: Ints
    shard: Ints
    row: Ints
    passes: Ints


def epoch_quotas(shapes: list[SourceShape], epoch_samples: int | None) -> list[int]:
    """Count the samples that each source contributes to one epoch.

    Without weights and `epoch_samples` every source contributes all it holds. Otherwise shares follow the weights
    (without weights: the sizes), rounded so that they add up (largest remainders first).

    Raises:
        DataError: a source is empty.
        RecipeError: some sources have a weight and some have none, or a weight is not positive.
    """
    for shape in shapes:
        if shape.samples == 0:
            raise DataError(f"data.sources.{shape.name}: its index lists no samples; pack videos into it or remove it")
    weights = _weights(shapes)
    if weights is None and epoch_samples is None:
        return [shape.samples for shape in shapes]
    shares = np.array(weights or [shape.samples for shape in shapes], dtype=np.float64)
    total = epoch_samples if epoch_samples is not None else sum(shape.samples for shape in shapes)
    exact = shares / shares.sum() * total
    quotas = np.floor(exact).astype(np.int64)
    left = total - int(quotas.sum())
    # Stable: sources with equal remainders get theirs in the recipe's order, on every machine.
    quotas[np.argsort(quotas - exact, kind="stable")[:left]] += 1
    return [int(quota) for quota in quotas]


def _weights(shapes: list[SourceShape]) -> list[float] | None:
    weights = [shape.weight for shape in shapes if shape.weight is not None]
    if not weights:
        return None
    missing = [shape.name for shape in shapes if shape.weight is None]
    if missing:
        raise RecipeError(
            f"data.sources: {', '.join(missing)} without weight beside sources that have one; give every source a "
            "weight (shares relative to each other), or none (then shares follow the sizes)"
        )
    wrong = [f"{shape.name}={shape.weight}" for shape in shapes if not (shape.weight or 0) > 0]
    if wrong:
        raise RecipeError(f"data.sources: weight of {', '.join(wrong)}: a weight is above 0; remove unused sources")
    return weights


def check_lanes(samples: int, lanes: int, orders: int = 1) -> None:
    """Check that the samples of an epoch fill its lanes; `orders` share data.epoch_samples.

    Raises:
        DataError: they don't.
    """
    if samples < lanes:
        whose = f"an epoch has {samples} samples" + (" of each source" if orders > 1 else "")
        raise DataError(
            f"{whose} but data.lanes is {lanes}: set data.lanes to at most {samples}, or "
            f"data.epoch_samples to at least {orders * lanes}"
        )


class EpochOrder:
    """Order of one epoch over several sources.

    Args:
        shapes: The sources, in the recipe's order.
        quotas: Samples of each source in an epoch (`epoch_quotas`).
        seed: The recipe's run.seed.
        epoch: Epoch, from 0.
        lanes: Lanes of the order, C.
        window: Neighbouring samples of a lane that are shuffled among each other.
        key: Words that its permutations are keyed by besides seed and epoch, for orders that run side by side.

    Raises:
        DataError: fewer samples than lanes.
    """

    def __init__(
        self,
        shapes: list[SourceShape],
        quotas: list[int],
        seed: int,
        epoch: int,
        lanes: int,
        window: int,
        key: tuple[str, ...] = (),
    ) -> None:
        total = sum(quotas)
        check_lanes(total, lanes)
        self.seed, self.epoch, self.lanes, self.window, self._key = seed, epoch, lanes, window, key
        self.lane_length = total // lanes
        self._shape_ends = [np.cumsum(shape.counts) for shape in shapes]
        units = [_units(s, shape, quotas[s], seed, epoch) for s, shape in enumerate(shapes)]
        # Permuted over all sources before the line is cut into lanes: else a lane would hold one source after another.
        permutation = generator(seed, epoch, "units", *key).permutation(_width(units))
        self._units = np.concatenate(units, axis=1)[:, permutation]
        self._starts = np.cumsum(self._units[4]) - self._units[4]
        self._windows: dict[int, tuple[int, Ints]] = {}

    def __len__(self) -> int:
        """Count the positions of the epoch; up to lanes - 1 samples at the end of the line are left out."""
        return self.lane_length * self.lanes

    def locate(self, positions: npt.ArrayLike) -> Location:
        """Locate the samples of some positions; `positions` is one-dimensional, each in [0, len(self))."""
        position = np.asarray(positions, dtype=np.int64)
        if position.size and not (0 <= position.min() and position.max() < len(self)):
            raise IndexError(f"positions {position.min()}..{position.max()} outside of an epoch of {len(self)}")
        lane, step = position % self.lanes, position // self.lanes
        window, inside = step // self.window, step % self.window
        shuffled = np.fromiter(
            (
                self._permutation(*place)[i]
                # Python's integers: the key tells types apart, so NumPy's would draw other permutations.
                for *place, i in zip(lane.tolist(), window.tolist(), inside.tolist(), strict=True)
            ),
            dtype=np.int64,
            count=len(position),
        )
        index = lane * self.lane_length + window * self.window + shuffled
        # From the right: an index that equals a start belongs to the unit that begins there.
        unit = np.searchsorted(self._starts, index, side="right") - 1
        source, passes, shard, first, _ = self._units[:, unit]
        return Location(source, shard, first + index - self._starts[unit], passes)

    def substitute(self, source: int, position: int, attempt: int) -> tuple[int, int]:
        """Choose (shard, row) in place of an unusable sample: the same source, a function of position and attempt."""
        ends = self._shape_ends[source]
        # A hash and no state: who serves the position, or after which resume, must not change its substitute.
        index = key_of(self.seed, self.epoch, position, attempt, "substitute") % int(ends[-1])
        shard = int(np.searchsorted(ends, index, side="right"))
        return shard, index - (int(ends[shard - 1]) if shard else 0)

    def _permutation(self, lane: int, window: int) -> Ints:
        """Draw the order inside a window. One per lane is kept: a lane is walked forwards, and all lanes take turns."""
        known = self._windows.get(lane)
        if known is not None and known[0] == window:
            return known[1]
        size = min(self.window, self.lane_length - window * self.window)
        drawn = generator(self.seed, self.epoch, lane, window, *self._key).permutation(size)
        self._windows[lane] = (window, drawn)
        return drawn


def _width(units: list[Ints]) -> int:
    return sum(block.shape[1] for block in units)


def _units(source: int, shape: SourceShape, quota: int, seed: int, epoch: int) -> Ints:
    """List what one source gives to one epoch, as columns (source, pass, shard, first row, rows).

    The source is an endless line of passes, each with its shards in an order of its own; epoch e takes the stretch
    [e * quota, (e + 1) * quota), so a pass that ends in mid-epoch goes on where it stopped in the next epoch.
    """
    begin, end = epoch * quota, (epoch + 1) * quota
    size = shape.samples
    columns = []
    for number in range(begin // size, -(-end // size)):
        # Keyed by the source's name, so that another source in the recipe does not reorder this one, and by the pass,
        # so that one which ends in mid-epoch goes on in the same order.
        order = generator(seed, shape.name, number, "shards").permutation(len(shape.counts))
        ends = number * size + np.cumsum(shape.counts[order])
        starts = ends - shape.counts[order]
        low, high = np.maximum(starts, begin), np.minimum(ends, end)
        used = high > low
        first, rows = (low - starts)[used], (high - low)[used]
        columns.append(np.stack([np.full_like(first, source), np.full_like(first, number), order[used], first, rows]))
    return np.concatenate(columns, axis=1) if columns else np.empty((5, 0), dtype=np.int64)
