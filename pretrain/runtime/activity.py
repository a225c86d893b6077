"""What this process is doing now: noted where the work happens, read by the watchdog's thread."""

import time
from dataclasses import dataclass, field

#: Phases in which a rank waits for the others: one that hangs there is rarely the one to blame.
COLLECTIVE = ("backward", "all-reduce", "optimiser")


@dataclass(frozen=True)
class Moment:
    """A phase ("start", "data", "forward", "backward", "all-reduce", "optimiser", "save", ...) and when it began."""

    phase: str
    since: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """How long the phase has lasted."""
        return time.monotonic() - self.since


_current = Moment("start")


def note(phase: str) -> None:
    """This process is now in `phase`. Costs a microsecond, so it can be called for every micro-batch."""
    global _current
    _current = Moment(phase)


def current() -> Moment:
    """The phase of now."""
    return _current
