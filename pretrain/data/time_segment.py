"""A piece of a video, in seconds."""

import math
from fractions import Fraction
from typing import Any, NamedTuple, Self

#: Seconds by which a number in a list may miss the frame that it means: lists round to milliseconds.
ROUNDING_S = 0.0005


class Segment(NamedTuple):
    """Frames shown from `start` until before `end`, seconds after the video's first frame; None: to its end."""

    start: float
    end: float | None

    @classmethod
    def checked(cls, start: Any, end: Any) -> Self:
        """Build a segment of numbers as a list states them.

        Raises:
            ValueError: not numbers, negative, or nothing between them.
        """
        try:
            begins, ends = float(start or 0), None if end in (None, "") else float(end)
        except (TypeError, ValueError) as error:
            raise ValueError(f"start {start!r} and end {end!r}: seconds are expected") from error
        if not (0 <= begins < math.inf and (ends is None or begins < ends < math.inf)):
            raise ValueError(f"a segment from {start} to {end} s: expected 0 <= start < end, in seconds")
        return cls(begins, ends)

    def ticks(self, first: int, time_base: Fraction) -> tuple[int, int | None]:
        """Compute the bounds [from, to) of the time stamps of its frames, in ticks of `time_base`.

        Args:
            first: Time stamp of the video's first frame.
            time_base: Seconds a tick.
        """
        return self._tick(self.start, first, time_base), (
            None if self.end is None else self._tick(self.end, first, time_base)
        )

    def latest_key(self, first: int, time_base: Fraction) -> int:
        """Compute the last time stamp of a key frame from which the segment can be decoded; see `ticks`."""
        return first + math.floor(Fraction(self.start + ROUNDING_S) / time_base)

    @staticmethod
    def _tick(seconds: float, first: int, time_base: Fraction) -> int:
        # Not below 0: a bound before the first frame could make `of` slice from a negative index, counted from the end.
        return first + math.ceil(Fraction(max(seconds - ROUNDING_S, 0)) / time_base)

    def of(self, stamps: range, time_base: Fraction) -> range:
        """Select those of a video's evenly spaced time stamps that lie in it."""
        begin, end = self.ticks(stamps.start, time_base)
        to = len(stamps) if end is None else -((stamps.start - end) // stamps.step)
        return stamps[-((stamps.start - begin) // stamps.step) : to]

    def __str__(self) -> str:
        return f"{self.start:g} to {'the end' if self.end is None else f'{self.end:g} s'}"
