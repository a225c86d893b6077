"""The hang watchdog: a thread in every rank that notices when no step finishes.

    a step takes `factor` times the median (at least `least_s`):  every rank writes its stacks, nothing is ended
    no rank enters another phase for `stop_after_s`, or one is gone:  the run ends, naming the ranks that are behind

A rank that waits for the others can't tell a hang from a slow rank; the heartbeat files can (runtime/heartbeats.py).
Where they can't be written or read, a second thread, which touches no file, log or terminal, ends the rank by itself.
Time in which the machine was suspended counts for nobody.
Long work is expected at the start (the first step compiles), in a save, an evaluation and pictures: until the first
step after it has finished, `long_s` stands in for the limit, and the process group is as patient.
"""

import contextlib
import logging
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.recipe.schema import Watchdog as Options
from pretrain.runtime import stacks
from pretrain.runtime.activity import awake, note, suspended
from pretrain.runtime.flight_recorder import dump_collectives
from pretrain.runtime.heartbeats import GONE_BEATS, Heartbeats, Seen, behind
from pretrain.runtime.metrics import JsonLines, read_records
from pretrain.runtime.process_group import WORK_TIMEOUT_S, Ranks, from_first, set_timeout
from pretrain.runtime.stopping import EXIT_REQUEUE
from pretrain.runtime.terminal import SAY_S, briefly

logger = logging.getLogger(__name__)

#: Steps whose median is the usual length of one.
WINDOW = 50

#: Ranks that read the beats of all in a stall; all of a thousand doing so would stall the file system.
JUDGES = 8

#: The process group is more patient than the watchdog, and that more than a read, by this many seconds: what the inner
#: one says of the cause is more to the point.
MARGIN_S = 60.0

#: Seconds that a thread may wake up late; more, and the process was suspended.
SUSPENDED_S = 30.0

#: Run folder's list of the starts that ended in a hang.
HANGS = "hangs.jsonl"


@dataclass(frozen=True)
class Limits:
    """Seconds until a step is a stall, and from then on until a run in which nobody goes on is given up.

    `slow_s` and `factor` hold in ordinary steps, `long_s` where long work is expected.
    """

    factor: float
    slow_s: float
    long_s: float
    stop_after_s: float

    @classmethod
    def of(cls, options: Options, deadline_s: float) -> "Limits":
        """Derive the limits from the recipe; a rank may wait for storage for `deadline_s` and hold the others."""
        stop = options.stop_after_s or deadline_s + MARGIN_S
        return cls(options.factor, options.least_s, options.long_s, stop)


class Watchdog:
    """Watch over one start of a run in one rank. Every rank makes one at the same time.

    Args:
        options: The recipe's `watchdog`.
        deadline_s: The recipe's data.deadline_s.
        folder: The run folder.
        ranks: This process among all.
        check: Called before each beat; ends the process where the folder is another one's by now (Hold.check).
    """

    def __init__(
        self,
        options: Options,
        deadline_s: float,
        folder: Path,
        ranks: Ranks,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._options, self._folder, self._ranks, self._check = options, folder, ranks, check
        self.limits = Limits.of(options, deadline_s)
        self._first_step, self._step, self._saved, self._hangs = 0, 0, False, 0
        self._steps_s: deque[float] = deque(maxlen=WINDOW)
        self._mark = awake()
        self._patient, self._timeout_s = True, 0.0
        self._reported: float | None = None
        # Rank 0's clock for all: with names of their own, no rank would find the beats of another.
        start = from_first(ranks, f"{time.time_ns():x}")
        self._beats = Heartbeats(folder, start, ranks.rank, ranks.world_size)
        if ranks.first:
            self._beats.clear_others()
        stacks.announce(folder, ranks.rank)
        self._closed = threading.Event()
        self._leaving: threading.Timer | None = None
        self._lock, self._awoke, self._answered = threading.Lock(), time.monotonic(), awake()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._alone = threading.Thread(target=self._watch_alone, daemon=True, name="watchdog alone")
        note("start")
        self._set_patience(True)
        if options.enabled:
            self._thread.start()
            self._alone.start()

    def begin(self, first_step: int) -> None:
        """Tell how many steps earlier starts have done: where this one continues."""
        self._first_step = self._step = first_step
        earlier = read_records(self._folder / HANGS, ("from_step",))
        self._hangs = sum(record["from_step"] == first_step for record in earlier)

    def step_done(self, steps_done: int) -> None:
        """Note that a step has finished: its length counts towards the median, unless long work lay in it."""
        now = awake()
        if not self._patient:
            self._steps_s.append(now - self._mark)
        self._mark, self._step = now, steps_done
        self._set_patience(False)

    @contextlib.contextmanager
    def long(self, phase: str) -> Iterator[None]:
        """Run the block as `expect_long` work; where it raises, the run is over."""
        self.expect_long(phase)
        yield
        # Not in a `finally`: where the block raised, the heartbeat must go on naming the phase that failed.
        self._mark = awake()
        self._saved = self._saved or phase == "save"
        note("data")

    def expect_long(self, phase: str) -> None:
        """Expect long work that all ranks, or one of them, do now; the others may wait for it in the next step."""
        self._set_patience(True)
        self._mark = awake()
        note(phase)

    def renew_timeout(self) -> None:
        """Set the timeout of collectives again: groups have been made since, with a back end's own."""
        set_timeout(self._timeout_s or WORK_TIMEOUT_S)

    def close(self) -> None:
        """Stop watching: the run is over, or has failed and is cleaned up."""
        self._closed.set()
        if self._leaving is not None:
            self._leaving.cancel()
        # Nobody renews the timeout from here on: what cleans up may take longer than an ordinary step.
        set_timeout(WORK_TIMEOUT_S)
        for thread in (self._thread, self._alone):
            if thread.is_alive():
                # Not for ever: it may stand in a write to a disk that is gone.
                thread.join(timeout=2 * SAY_S)

    def leave_soon(self) -> None:
        """End the process of this failed rank in `leave_s` even if cleaning up waits for ranks that are gone."""
        self._closed.set()
        note("leaving")
        if self._options.enabled and self._leaving is None:
            self._leaving = threading.Timer(self._options.leave_s, self._leave_unclean)
            self._leaving.daemon = True
            self._leaving.start()

    @property
    def limit_s(self) -> float:
        """Seconds that the present step may take before it is a stall."""
        if self._patient:
            return self.limits.long_s
        usual_s = statistics.median(self._steps_s) if self._steps_s else 0.0
        return max(self.limits.slow_s, self.limits.factor * usual_s)

    @property
    def exit_code(self) -> int:
        """Exit code: 75 asks for another start, unless several in a row have hung without a checkpoint between them."""
        again = self._saved or self._hangs < self._options.max_restarts
        return EXIT_REQUEUE if self._options.on_hang == "requeue" and again else 1

    def _set_patience(self, patient: bool) -> None:
        self._patient = patient
        timeout_s = self.limit_s + self.limits.stop_after_s + MARGIN_S
        if self._options.enabled and abs(timeout_s - self._timeout_s) > 0.1 * timeout_s:
            set_timeout(timeout_s)
            self._timeout_s = timeout_s

    def _watch(self) -> None:
        while True:
            self._notice_suspension()
            try:
                self._look()
                self._answered = awake()
            except Exception as error:  # a full or lost file system, among others, must not end the watch
                say(logging.WARNING, f"watchdog: {type(error).__name__}: {error}")
            if self._closed.wait(self._options.beat_s):
                return

    def _watch_alone(self) -> None:
        """End this rank in a stall in which the other thread gets no answer of files, log or terminal."""
        while not self._closed.wait(self._options.beat_s):
            self._notice_suspension()
            now, patience_s = awake(), self.limits.stop_after_s
            if now - self._mark - self.limit_s > patience_s and now - self._answered > patience_s:
                say(
                    logging.CRITICAL,
                    f"hang: step {self._step + 1} has not finished after {now - self._mark:.0f} s, and neither the "
                    f"heartbeats in {self._folder} nor the log could be written for {now - self._answered:.0f} s: this "
                    "rank leaves without knowing of the others",
                )
                _kill_workers()
                os._exit(self.exit_code)

    def _notice_suspension(self) -> None:
        with self._lock:  # whichever thread wakes first notices, the other then finds nothing
            late_s = time.monotonic() - self._awoke - self._options.beat_s
            self._awoke = time.monotonic()
            if late_s > SUSPENDED_S:
                suspended(late_s)
        if late_s > SUSPENDED_S:
            say(logging.WARNING, f"this process stood still for {late_s:.0f} s (suspended?); nothing is judged by that")

    def _look(self) -> None:
        self._check()
        self._beats.beat(self._step + 1)
        if self._beats.given_up:
            self._end()
            return
        stalled_s = awake() - self._mark - self.limit_s
        if stalled_s < 0:
            if self._reported is not None:
                say(logging.WARNING, f"step {self._step}: going on after a stall of {awake() - self._reported:.0f} s")
                self._reported = None
            return
        if self._reported is None:
            self._reported = awake() - self.limit_s
            with contextlib.suppress(OSError):  # a full disk has no room for stacks, which are no reason not to judge
                stacks.dump(self._step + 1)
            self._dump_collectives()
            say(
                logging.WARNING,
                f"step {self._step + 1}: not finished after {self.limit_s:.0f} s (watchdog.factor, watchdog.least_s); "
                f"stacks in {self._folder / 'stacks'}, stop in {self.limits.stop_after_s:.0f} s unless a rank goes on",
            )
        self._judge()

    def _judge(self) -> None:
        if self._ranks.rank % max(1, self._ranks.world_size // JUDGES):
            return
        seen = self._beats.read()
        gone = [one for one in seen.values() if one.age_s > GONE_BEATS * self._options.beat_s]
        idle_s = min((one.idle_s for one in seen.values() if one not in gone), default=0.0)
        # Only the rank whose verdict stands tells: the lines of eight judges would count as eight hangs in a row.
        if (gone or idle_s > self.limits.stop_after_s) and self._beats.give_up(reason := self._reason(seen, gone)):
            say(logging.CRITICAL, reason)
            record = {"from_step": self._first_step, "step": self._step + 1, "reason": reason, "at": time.time()}
            with contextlib.closing(JsonLines(self._folder / HANGS)) as hangs:
                hangs.write(record)

    def _reason(self, seen: dict[int, Seen], gone: list[Seen]) -> str:
        if gone:
            names, what = gone, "no longer write their heartbeat (process or host lost?)"
        else:
            names, what = behind(seen), "are behind, the others wait for them"
        if not names:
            names, what = list(seen.values()), "wait for each other in a collective: a network, or a rank that left it"
        listed = "; ".join(map(str, names[:8])) + (f"; and {len(names) - 8} more" if len(names) > 8 else "")
        return (
            f"hang: step {self._step + 1} has not finished after {awake() - self._mark:.0f} s. "
            f"{len(names)} of {self._ranks.world_size} ranks {what}: {listed}. Stacks of every rank and data worker "
            f"are in {self._folder / 'stacks'}; launch/doctor.py checks hosts, network and storage"
        )

    def _end(self) -> None:
        """Leave without cleaning up, which might wait for a rank that hangs."""
        briefly(lambda: stacks.dump(self._step + 1))
        self._dump_collectives()
        # Whoever leaves first makes the launcher end the others, who are still writing their stacks.
        time.sleep(min(2 * self._options.beat_s, 10.0))
        for stream in (sys.stdout, sys.stderr):
            briefly(stream.flush)
        # Not sys.exit at the end: it would end this thread alone, and the main thread hangs in a collective.
        _kill_workers()
        os._exit(self.exit_code)

    def _dump_collectives(self) -> None:
        # Briefly: the back end that hangs may hold the record's lock.
        briefly(lambda: dump_collectives(self._folder, self._ranks.rank, self._step + 1))

    def _leave_unclean(self) -> None:
        seconds = self._options.leave_s
        say(logging.CRITICAL, f"this rank failed and could not clean up within {seconds:.0f} s; it leaves now")
        _kill_workers()
        os._exit(1)


def say(level: int, text: str) -> None:
    """Log a line, but don't wait for a console that nobody reads: a pager, Ctrl-S, a dead collector of logs."""
    briefly(lambda: logger.log(level, "%s", text))


def _kill_workers() -> None:
    """Kill the data workers: they end by themselves when their rank is gone, but not one that stands still."""
    # The main thread may be ending them at this moment; nothing that goes wrong here may keep the rank from leaving.
    with contextlib.suppress(Exception):
        for worker in multiprocessing.active_children():
            worker.kill()
