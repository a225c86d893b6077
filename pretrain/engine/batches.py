"""The micro-batches of a rank, and how a run ends when one rank gets no more.

A rank that just raised would leave the others waiting in a collective call, and the steps since the last checkpoint
would be lost. So it goes on with a stand-in to where all ranks agree on the step, and all end there, with a checkpoint.
"""

import functools
import logging
from collections.abc import Iterator

import torch

from pretrain.data.samples import Batch
from pretrain.data.stream import TrainStream
from pretrain.engine.prefetch import ON_DEVICE, Prefetcher, arrivals
from pretrain.errors import DataError
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)


class MicroBatches:
    """Endless micro-batches; one is ahead, on its way to the device, where that is no CPU.

    Args:
        stream: The rank's stream.
        device: The rank's.

    Attributes:
        error: Why the stream ended; since then the last micro-batch is handed out again, without samples to count.
    """

    def __init__(self, stream: TrainStream, device: torch.device) -> None:
        self._stream = stream
        self._prefetcher: Prefetcher | None = None
        if device.type != "cpu":
            self._prefetcher = Prefetcher(stream, functools.partial(arrivals, device))
        self._last: Batch | None = None
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch, or a stand-in after an error.

        Raises:
            DataError: there has been no micro-batch yet, and so no step that could be lost.
        """
        if self.error is None:
            try:
                batch = next(self._prefetcher or self._stream)
                # Without what is on the device, whose memory the step gives back when it is done with it.
                self._last = {name: value for name, value in batch.items() if name != ON_DEVICE}
                return batch
            except DataError as error:
                if self._last is None:
                    raise
                logger.error("no more data: %s", error)
                self.error = error
                # Without samples: the ledger would count those of the last micro-batch twice.
                self._last = self._last | {"bad": [], "source": torch.empty(0), "view": torch.empty(0)}
        assert self._last is not None
        return self._last

    def source_of(self, step: int) -> str:
        """Name the one source that a step is made of; empty where it has all."""
        return self._stream.source_of(step)

    def close(self) -> None:
        """End the stream's workers."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._stream.close()

    def agreed_error(self, ranks: Ranks) -> DataError:
        """Name the error that ended a rank's data; all ranks call this after they have agreed that one has no more."""
        said = gather_objects(ranks, None if self.error is None else str(self.error))
        rank, first = next((rank, text) for rank, text in enumerate(said) if text is not None)
        others = sum(text is not None for text in said) - 1
        also = f" ({others} more ranks report the like)" if others else ""
        return DataError(f"rank {rank}: {first}{also}" if ranks.world_size > 1 else first)
