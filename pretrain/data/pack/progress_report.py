"""Progress and summary of packing: a bar, or log lines where there is no terminal, and a report at the end."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.data.pack.pack_run import Progress, Report
from pretrain.runtime import storage

#: Seconds between two lines in a log file at first; later a twentieth of the time that it has taken, at most so many.
LOG_EVERY, LOG_EVERY_LATER = 5.0, 60.0
SHOWN_REASONS = 3


@contextmanager
def progress_bar(total: int, noun: str = "videos", work: str = "pack") -> Iterator[Progress]:
    """Provide a function for `pack`, or other work, to call after every sample: a live bar with rate and time left on a
    terminal."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    # In a log file a live bar is thousands of lines of control characters.
    if not console.is_terminal:
        with _log_lines(total, noun, work) as show:
            yield show
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(work), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bar:
        rates = _Rates(noun)
        task = bar.add_task(work, total=total, rate="")

        def show(done: int, of: int, read: int) -> None:
            rates.update(done, read)
            bar.update(task, completed=done, total=of, rate=str(rates))

        yield show


@contextmanager
def _log_lines(total: int, noun: str, work: str) -> Iterator[Progress]:
    """Write a line every few seconds, by a thread: a long film alone would else be silence, as of work that hangs."""
    rates, state, over = _Rates(noun), [0, total], threading.Event()

    def show(done: int, of: int, read: int) -> None:
        rates.update(done, read)
        state[:] = done, of

    def tell() -> None:
        while not over.wait(min(max(rates.seconds / 20, LOG_EVERY), LOG_EVERY_LATER)):
            done, of = state
            left = f"{rates.left(of)} left" if done else f"{rates.seconds:.0f} s"
            sys.stderr.write(f"{work}: {done}/{of} {noun}, {rates}, {left}\n")

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield show
    finally:
        over.set()
        teller.join()


class _Rates:
    """Samples and bytes a second since the start of this run (a restart begins in the middle)."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self.began = time.monotonic()
        self.first: int | None = None
        self.done = self.read = 0

    def update(self, done: int, read: int) -> None:
        self.first = done - 1 if self.first is None else self.first
        self.done, self.read = done, read

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-6)

    @property
    def samples_per_second(self) -> float:
        return (self.done - (self.first or 0)) / self.seconds

    def __str__(self) -> str:
        return f"{self.samples_per_second:.1f} {self.noun}/s, {self.read / 1e6 / self.seconds:.1f} MB/s"

    def left(self, of: int) -> str:
        seconds = int((of - self.done) / max(self.samples_per_second, 1e-6))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def report_text(report: Report, dest: str) -> str:
    """Write the summary: what was packed, what was left out and why."""
    lines = [f"pack: {report.packed} {report.noun} packed" + _kept(report) + f", {len(report.rejected)} rejected"]
    if report.resumed:
        lines[0] += f"; {report.resumed} were already done"
    for reason, count in Counter(one.reason for one in report.rejected).most_common():
        lines.append(f"pack:   {count} {reason}")
        shown = [one for one in report.rejected if one.reason == reason][:SHOWN_REASONS]
        lines += [f"pack:     {one.path}: {one.detail}" for one in shown]
    if report.index is None:
        lines.append("pack: other parts are not done yet; the last one writes the index (or --merge)")
        return "\n".join(lines)
    index = report.index
    if report.rejected:
        lines.append(f"pack: all of them: {storage.join(dest, 'rejected.jsonl')}")
    size = sum(shard.bytes for shard in index.shards) / 1e6
    lines.append(
        f"pack: {dest}: {len(index.shards)} shards, {index.samples} samples, {size:.1f} MB, "
        f"fingerprint {index.fingerprint}"
    )
    return "\n".join(lines)


def _kept(report: Report) -> str:
    kept, encoded = report.reencoded["kept"], report.reencoded["encoded"]
    what = "streams" if report.noun == "videos" else "files"
    return f" ({kept} {what} kept, {encoded} encoded)" if kept + encoded else ""
