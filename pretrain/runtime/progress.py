"""The console: one live line on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

#: Share of the step's time spent waiting for data above which a hint is given, and steps left out at the start.
DATA_WAIT_LIMIT = 0.05
WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Goal:
    """Course of a run: the step it starts from, its last step, and steps between two plain lines."""

    first: int
    last: int
    every: int


class Progress:
    """Display of step, epoch, loss, learning rate, clips/s, tokens/s, MFU, data wait, memory and the time left."""

    def __init__(self, goal: Goal, live: bool | None = None) -> None:
        self._goal = goal
        self._started = time.monotonic()
        self._hinted = False
        self._window: deque[dict[str, Any]] = deque(maxlen=goal.every)
        self._live: Any = None
        if sys.stderr.isatty() if live is None else live:
            self._start_live()

    def show(self, record: dict[str, Any]) -> None:
        """Show one step's record of metrics.jsonl."""
        step = record["step"]
        self._window.append(record)
        record = record | self._speeds()
        line = self._line(record)
        if self._live is not None:
            self._live.update(self._task, completed=step, description=line)
        if (self._live is None and step % self._goal.every == 0) or step == self._goal.last:
            logger.info(line)
        self._hint(record)

    def close(self) -> None:
        """Stop the live line and leave it as it is."""
        if self._live is not None:
            self._live.stop()

    def _start_live(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._live = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), transient=False)
        self._task = self._live.add_task("starting", total=self._goal.last, completed=self._goal.first)
        self._live.start()

    def _speeds(self) -> dict[str, Any]:
        """Average speeds over the steps since the last line: single steps vary too much to be read."""
        seconds = sum(record["speed/step_s"] for record in self._window)

        def mean(key: str) -> float:
            return float(sum(record[key] * record["speed/step_s"] for record in self._window) / seconds)

        return {key: mean(key) for key in self._window[-1] if key.startswith("speed/")}

    def _line(self, record: dict[str, Any]) -> str:
        parts = [
            f"step {record['step']}/{self._goal.last}",
            f"epoch {record['epoch']:.2f}",
            f"loss {record['train/loss']:.4f}",
            f"lr {record['optim/lr']:.2e}",
            f"{record['speed/clips_per_s']:.1f} clips/s",
        ]
        if "speed/tokens_per_s" in record:
            parts.append(f"{record['speed/tokens_per_s']:.0f} tokens/s")
        if "speed/mfu" in record:
            parts.append(f"MFU {record['speed/mfu']:.1%}")
        parts += [
            f"data wait {record['speed/data_wait_share']:.1%}",
            f"{record['memory/peak_gib']:.1f} GiB",
            f"ETA {duration(self._seconds_left(record['step']))}",
        ]
        return "  ".join(parts)

    def _seconds_left(self, step: int) -> float:
        # From where this start began: counted from 0, a resumed run would seem to have done all of it just now.
        done = max(1, step - self._goal.first)
        return (time.monotonic() - self._started) / done * (self._goal.last - step)

    def _hint(self, record: dict[str, Any]) -> None:
        late_enough = record["step"] - self._goal.first > WARM_UP_STEPS
        if late_enough and not self._hinted and record["speed/data_wait_share"] > DATA_WAIT_LIMIT:
            self._hinted = True
            logger.warning(
                "the device waits for data %.0f %% of the time: give each rank more cores and set data.workers=null, "
                "which takes all of them, read what launch/pack.py encoded (its reference frames at every fourth frame "
                "decode fastest) with input.decoder=pyav, draw more input.views from each clip, or read from nearer "
                "(data.cache_dir)",
                100 * record["speed/data_wait_share"],
            )


def duration(seconds: float) -> str:
    """Format seconds as `1d 02:03:04`, without days where there are none."""
    whole = max(0, round(seconds))
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text
