"""Samples that kill their decoder: found, taken out, and replaced like every other sample that can't be used.

A decoder is C code: a damaged file may make it crash, or never return, and no exception tells of it. So each data
worker notes in shared memory what it is decoding. When one dies, the rank reads there which sample did it, and starts
the workers again at the same micro-batch, told to leave that sample alone; the order, being arithmetic, stays as it is.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.errors import SampleError

logger = logging.getLogger(__name__)

#: A sample by number of its source, shard and row.
Location = tuple[int, int, int]

#: How a process ends that is killed by its own code, and not by the kernel's out-of-memory killer or a person.
CRASHES = {-int(number) for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)}

#: Numbers a worker notes: its process id, 1 while it decodes, and the sample's location.
FIELDS = 5

#: Seconds between two looks at whether a decoder still works.
LOOK_S = 1.0


class CrashNotes:
    """Notes of what each worker of a rank is decoding, in memory that they share.

    Args:
        workers: Number of workers; 0: the rank decodes itself, and nothing can outlive a crash.
        limit_s: Longest time that decoding one sample may take before its worker gives up, seconds.
    """

    def __init__(self, workers: int, limit_s: float) -> None:
        # No lock: a worker that dies while it holds one would block the rank for ever.
        self._notes = multiprocessing.get_context("spawn").RawArray("q", max(workers, 1) * FIELDS)
        self._limit_s = limit_s
        self._known: frozenset[Location] = frozenset()

    def remember(self, location: Location) -> None:
        """Leave a sample alone from the next start of the workers on."""
        self._known |= {location}

    def of(self, process: int) -> Location | None:
        """Find the sample that a process was decoding when it died; None where it was doing something else."""
        for begin in range(0, len(self._notes), FIELDS):
            owner, busy, *location = self._notes[begin : begin + FIELDS]
            if owner == process and busy:
                return location[0], location[1], location[2]
        return None

    def decoder(self, worker: int | None) -> "Decoding":
        """Build the notes of one worker; None: the rank itself, which nobody watches."""
        return Decoding(None if worker is None else self._notes, (worker or 0) * FIELDS, self._known, self._limit_s)


class Decoding:
    """Notes of one worker, from inside."""

    def __init__(self, notes: object, begin: int, known: frozenset[Location], limit_s: float) -> None:
        self._notes, self._begin, self._known, self._limit_s = notes, begin, known, limit_s
        self._busy, self._started = False, 0
        if notes is not None:
            threading.Thread(target=self._watch, daemon=True, name="decoder watch").start()

    @contextmanager
    def of(self, location: Location) -> Iterator[None]:
        """Note that a sample is being decoded.

        Raises:
            SampleError: "crash" for a sample that has killed a worker before.
        """
        if location in self._known:
            raise SampleError("crash", f"it killed its decoder, or kept it busy for {self._limit_s:g} s")
        self._note(1, location)
        self._busy, self._started = True, self._started + 1
        try:
            yield
        finally:
            self._busy = False
            self._note(0, location)

    def _note(self, busy: int, location: Location) -> None:
        if self._notes is not None:
            self._notes[self._begin : self._begin + FIELDS] = [os.getpid(), busy, *location]  # type: ignore[index]

    def _watch(self) -> None:
        """End this process when a decoder hangs: only that stops C code.

        Looks are counted, and no clock is read: a job that was suspended for an hour has not decoded for an hour.
        """
        looks, seen = 0, 0
        while True:
            time.sleep(LOOK_S)
            looks = looks + 1 if self._busy and self._started == seen else 0
            seen = self._started
            if looks * LOOK_S > self._limit_s:
                # Counts as a crash, so that the rank leaves this sample out; an exit code of our own would end the run.
                os.kill(os.getpid(), signal.SIGABRT)
