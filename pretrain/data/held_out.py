"""A small set of held-out samples, each once, as the one row by which it is judged; ranks share them."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from pretrain.data.fetch import SampleReader, read_ahead
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from pretrain.data.samples import Arrays, Batch, Samples, SourceInfo, joined
from pretrain.errors import SampleError
from pretrain.recipe.schema import Source
from pretrain.runtime.process_group import Ranks

logger = logging.getLogger(__name__)

#: Samples decoded at a time, ahead of the network.
DECODERS = 4

#: Number of the sample in the set, label, arrays [1, ...].
Row = tuple[int, str, Arrays]


@dataclass(frozen=True)
class HeldOutBatch:
    """Rows that are judged together: tensors [B, ...] by name on the rank's device, their numbers in the set, labels.

    A sample without a label has an empty one, where labels are not asked for.
    """

    rows: Batch
    numbers: list[int]
    labels: list[str]


class HeldOut:
    """Samples of one folder of shards; decoded by threads of this process, since a worker's start would take longer.

    Args:
        name: for messages.
        shards: folder, any fsspec URL.
        samples: makes the row of a sample, by `without_chance`.
        ranks: this process among all.
        micro: rows of a batch.
        deadline_s: longest time of one read, seconds.
        labelled: leave samples without a label out, with a warning.

    Raises:
        DataError: the shards can't be read.
    """

    def __init__(
        self, name: str, shards: str, samples: Samples, ranks: Ranks, micro: int, deadline_s: float,
        labelled: bool = True,
    ) -> None:  # fmt: skip
        self._name, self._samples, self._ranks, self._micro, self._labelled = name, samples, ranks, micro, labelled
        self._index = load_index(shards)
        self._source = SourceInfo(name, self._index.shards, Source(shards=shards))
        self._reader = SampleReader([self._index], None, deadline_s)

    @property
    def url(self) -> str:
        """The folder."""
        return self._index.url

    @property
    def most_batches(self) -> int:
        """Most batches that any rank has: samples that can't be used make them fewer on one rank and not on others."""
        return math.ceil(math.ceil(self._index.samples / self._ranks.world_size) / self._micro)

    def blank(self) -> Batch:
        """Make a row of made-up content, for forward passes in which a rank without samples takes part."""
        made_up = self._samples.example(1).items()
        return {name: value[:1].to(self._ranks.device) for name, value in made_up if isinstance(value, Tensor)}

    def batches(self) -> Iterator[HeldOutBatch]:
        """Read this rank's samples: of all in a row, number rank, rank + world_size, ..."""
        waiting: list[Row] = []
        for place, row in read_ahead(self._places(), self._read, DECODERS):
            try:
                waiting.append(row.result())
            except SampleError as error:
                logger.warning("%s: %s can't be used: %s", self._name, self._reader.key(0, *place[1:]), error)
                continue
            if len(waiting) == self._micro:
                yield self._joined(waiting)
                waiting = []
        if waiting:
            yield self._joined(waiting)

    def _joined(self, rows: list[Row]) -> HeldOutBatch:
        tensors = joined([arrays for _, _, arrays in rows])
        on_device = {name: value.to(self._ranks.device) for name, value in tensors.items()}
        return HeldOutBatch(on_device, [number for number, _, _ in rows], [label for _, label, _ in rows])

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Yield number, shard and row of this rank's samples."""
        rows = [(shard, row) for shard, count in enumerate(self._index.shards.samples.tolist()) for row in range(count)]
        for number in range(self._ranks.rank, len(rows), self._ranks.world_size):
            yield (number, *rows[number])

    def _read(self, place: tuple[int, int, int]) -> Row:
        number, shard, row = place
        members = parse_sample(self._reader.read(0, shard, row))
        label = members.label
        if label is None and not self._labelled:
            return number, "", self._samples.without_chance(self._source, members)
        # To Python a bool is an int, but no class is called True.
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise SampleError("label", f"{label!r} is no class name or number")
        return number, str(label), self._samples.without_chance(self._source, members)
