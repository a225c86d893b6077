"""The phase that this process is in: noted where the work happens, read by the watchdog's thread."""

import time
from dataclasses import dataclass, field

#: Phases in which a rank waits for the others: one that hangs there is rarely the one to blame.
COLLECTIVE = ("backward", "all-reduce", "optimiser")


#: Seconds that this process was suspended for, as far as somebody noticed.
_suspended = 0.0


def awake() -> float:
    """Read a clock, in seconds, that stands still while the process is suspended: a closed lid, a paused machine."""
    return time.monotonic() - _suspended


def suspended(seconds: float) -> None:
    """Take note of a suspension, so that nobody is judged by the time that passed in it."""
    global _suspended
    _suspended += seconds


@dataclass(frozen=True)
class Moment:
    """A phase ("start", "data", "forward", "backward", "all-reduce", "optimiser", "save", ...) and when it began."""

    phase: str
    since: float = field(default_factory=lambda: awake())

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return awake() - self.since


_current = Moment("start")


def note(phase: str) -> None:
    """Note that this process is now in `phase`. Costs a microsecond, so it can be called for every micro-batch."""
    global _current
    # One assignment of a frozen object: the watchdog's thread reads it without a lock, and never half of a change.
    _current = Moment(phase)


def current() -> Moment:
    """Return the present phase."""
    return _current
