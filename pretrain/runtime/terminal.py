"""Standard streams that a run can lose: a closed terminal, a pipe without a reader, none at all."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

NAMES = ("stdout", "stderr")

#: Longest time that lines, stacks and flushing may hold up a verdict, seconds: a console that nobody reads, or a lost
#: disk, would hold it up for ever.
SAY_S = 5.0


def guard_streams() -> None:
    """Make the standard streams exist, and make losing them harmless: a run goes on when its terminal is gone."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Taken, or the next file that is opened gets the number, and what C libraries print goes into a checkpoint.
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for number, name in enumerate(NAMES, 1):
        stream = getattr(sys, name)
        if stream is None:  # Python found none
            stream = open(number, "w", encoding="utf-8", closefd=False)
        elif isinstance(stream, GuardedStream):
            continue
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a stream that a caller put there
            # A locale that has no umlauts must not end a run whose folder has one.
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, GuardedStream(stream))


def take_any_name() -> None:
    """Let standard output take names that its encoding lacks, escaped, as standard error does by itself."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a stream that a caller put there, or none
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class GuardedStream:
    """Text stream that swallows what nobody can read any more.

    Args:
        stream: that is written to while it can be.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text where the terminal or the pipe's reader is gone."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # EIO, EPIPE, a full disk behind a redirection; ValueError: closed
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is waiting."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Point the stream to nowhere: Python flushes it once more at its end, and would leave with 120 else 1."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def briefly(work: Callable[[], object]) -> None:
    """Run `work` in a thread and go on after `SAY_S` even if it has not ended; what it raises is dropped with it."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SAY_S)
