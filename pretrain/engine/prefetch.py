"""Micro-batches that are on the device before the step asks for them.

A thread takes the next micro-batch from the stream, and copies it on a stream of its own, while the device computes the
present one. Only one is ahead: each costs memory of the device. What the run saves counts the steps that were made, not
what was fetched, so resuming stays exact; an error of the data comes up when its micro-batch is asked for, as it would
without.
"""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

import torch
from torch import Tensor

from pretrain.data.samples import Batch
from pretrain.engine.transfers import to_device

#: Entry of a micro-batch whose tensors are on their way to the device: an `Arrival`.
ON_DEVICE = "on_device"

#: How long the end of a run waits for what is being fetched, seconds; its checkpoint is there already.
LEAVE_S = 10.0


class Arrival:
    """A micro-batch on its way to the device; a copy that is queued on the present stream of this thread.

    Args:
        batch: In memory of the host.
        device: Where it goes.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._batch = to_device(batch, device)
        self._copied = torch.Event(device=device)
        self._copied.record()
        self._device = device

    def take(self) -> Batch:
        """Give the tensors to what is queued from now on, which waits for them on the device; the host does not."""
        using = torch.accelerator.current_stream(self._device)
        using.wait_event(self._copied)
        for value in self._batch.values():
            if isinstance(value, Tensor):
                # Else their memory would go to the next copy as soon as Python has let go of them, though queued
                # kernels still read it.
                value.record_stream(using)
        return self._batch


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Give a micro-batch on `device`: what has been copied ahead, and the rest behind what is queued there."""
    there = batch[ON_DEVICE].take() if ON_DEVICE in batch else {}
    return there | to_device({name: batch[name] for name in batch if name not in there and name != ON_DEVICE}, device)


def arrivals(device: torch.device) -> Callable[[Batch], Arrival]:
    """Give what copies micro-batches on a stream of its own; the thread that calls this is the one that copies."""
    torch.accelerator.set_device_index(device)  # each thread has one; the first would be the default, for all ranks
    stream = torch.Stream(device=device)

    def copy(batch: Batch) -> Arrival:
        with stream:
            return Arrival(batch, device)

    return copy


class Prefetcher:
    """A stream of micro-batches, one ahead, each with its `Arrival`.

    Args:
        stream: Micro-batches in memory of the host.
        copying: Called once in the thread; gives what copies a micro-batch.
    """

    def __init__(self, stream: Iterator[Batch], copying: Callable[[], Callable[[Batch], Arrival]]) -> None:
        self._stream, self._copying = stream, copying
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._fetched: SimpleQueue[Batch | Exception] = SimpleQueue()
        # A daemon: one that waits for a store that hangs must not keep the process.
        self._thread = threading.Thread(target=self._serve, daemon=True, name="prefetch")
        self._started = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch; what its stream raises is raised here."""
        if not self._started:
            # Not before the first is asked for: workers of data then start as late as without.
            self._thread.start()
            self._started = True
            self._asked.put(True)
        fetched = self._fetched.get()
        if isinstance(fetched, Exception):
            self._fetched.put(fetched)  # whoever asks again is told again
            raise fetched
        self._asked.put(True)
        return fetched

    def close(self) -> None:
        """End the thread, once it has what it is fetching; one that waits for a store longer is left behind."""
        if self._started:
            self._asked.put(False)
            self._thread.join(LEAVE_S)

    def _serve(self) -> None:
        try:
            copy = self._copying()
            while self._asked.get():
                batch = next(self._stream)
                self._fetched.put({**batch, ON_DEVICE: copy(batch)})
        except Exception as error:
            self._fetched.put(error)
