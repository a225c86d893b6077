"""Reasons to stop before the end: signals, the stop file, the wall clock.

Each rank only notes that it was asked to; the step agrees on it with all ranks (engine/step.py), so all save at the
same step. The deepspeed launcher passes SIGTERM on to its ranks one after another, 30 s apart, then kills: a signal
sent to the launcher reaches some ranks too late. Touch the stop file instead, or signal a rank itself; one is enough.
"""

import contextlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

#: "Stopped as asked, start the same command again": EX_TEMPFAIL of sysexits.h, so that no shell or Python uses it.
EXIT_REQUEUE = 75

STOP_FILE = "stop"

#: File of the run folder with a Slurm job's number and start and its new end, seconds of the epoch, where the time
#: limit was changed while it runs: "1234.0 1767225600" (launch/slurm/job.sh).
END_FILE = ".end_time"

#: Ctrl-C and a closed terminal are requests as well; a second Ctrl-C leaves at once.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

#: Least time before the wall-clock limit at which a run stops, seconds; a save that took longer counts double.
LEAST_MARGIN_S = 30.0


#: Environment variable of the job scripts (launch/slurm): seconds between the signal to stop and the end of the job.
LEAD_VARIABLE = "TUBELET_STOP_LEAD_S"

#: File of the run folder with the longest save so far, which the next start compares with the job script's lead.
TIMINGS = "timings.json"


class StopWatch:
    """Record of requests to stop.

    Args:
        run_dir: Folder whose file `stop` asks for a stop.
        first: Whether this is rank 0, which looks for the file and at the clock.
        time_limit_minutes: Stop this long after `started`; None: at SLURM_JOB_END_TIME where set.
        started: Start of the run, seconds of the epoch.
        environ: For tests; default os.environ.
    """

    def __init__(
        self,
        run_dir: Path,
        first: bool,
        time_limit_minutes: float | None,
        started: float | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.reason: str | None = None
        self._file, self._end_file = run_dir / STOP_FILE, run_dir / END_FILE
        self._first = first
        environ = os.environ if environ is None else environ
        self._deadline = _deadline(time_limit_minutes, started or time.time(), environ)
        start = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_RESTART_COUNT', '0')}"
        self._job = start if time_limit_minutes is None else ""
        self._timings = run_dir / TIMINGS
        self._lead_s = float(environ.get(LEAD_VARIABLE, "inf"))
        self._save_s = _longest_save(self._timings) if first else 0.0
        self._warned = False
        self._check_lead()
        # What is ignored stays ignored: `nohup` means that the run outlives its terminal.
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._on_signal) for number in taken}
        if first:
            self._file.unlink(missing_ok=True)

    def saved_in(self, seconds: float) -> None:
        """Remember how long a save took: the run, and later starts of it, stop early enough for another one."""
        if seconds > self._save_s:
            self._save_s = seconds
            if self._first:
                with contextlib.suppress(OSError):  # measured anew by the next save
                    self._timings.write_text(json.dumps({"save_s": round(seconds, 3)}) + "\n", encoding="utf-8")
        self._check_lead()

    def asked(self) -> bool:
        """Tell whether this rank was asked to stop."""
        if self.reason is None and self._first:
            if self._file.exists():
                self.reason = f"stop file {self._file}"
            elif self._ends_soon() and not self._is_prolonged():
                self.reason = "wall-clock limit"
        return self.reason is not None

    def _ends_soon(self) -> bool:
        return time.time() > self._deadline - max(LEAST_MARGIN_S, 2 * self._save_s)

    def _is_prolonged(self) -> bool:
        """Look at the job's end anew; a file that another job, or start, has left says nothing of this one."""
        with contextlib.suppress(OSError, ValueError):  # none, or cut by a full disk
            job, end = self._end_file.read_text(encoding="utf-8").split()
            if job == self._job and float(end) > self._deadline:
                self._deadline = float(end)
                logger.info("the job ends at %s now", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(end))))
        return not self._ends_soon()

    def close(self) -> None:
        """Give the signals back and remove the stop file, so that the next start does not stop at once."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._first:
            with contextlib.suppress(OSError):  # a disk that became read-only must not hide why the run ended
                self._file.unlink(missing_ok=True)

    def _check_lead(self) -> None:
        """Warn once where the job script's signal leaves too little time; a save counts double, as everywhere here."""
        if self._first and not self._warned and 2 * self._save_s > self._lead_s:
            self._warned = True
            logger.warning(
                "a save takes %.0f s, and the job script asks for the stop %.0f s before the end (%s): too short for "
                "the rest of a step, the save and a slow disk. Ask for at least %.0f s: "
                "launch/slurm/submit.py --stop-lead, or --signal=B:USR1@N and %s in the job script",
                *(self._save_s, self._lead_s, LEAD_VARIABLE, 2 * self._save_s + LEAST_MARGIN_S, LEAD_VARIABLE),
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only noted: a handler runs between any two instructions, and a save from here would meet half a step.
        if number == signal.SIGINT and self.reason == "SIGINT":
            # By default, so that the shell sees an interrupt; a KeyboardInterrupt would unwind through half a step.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = signal.Signals(number).name


def _deadline(time_limit_minutes: float | None, started: float, environ: Mapping[str, str]) -> float:
    if time_limit_minutes is not None:
        return started + 60 * time_limit_minutes
    return float(environ.get("SLURM_JOB_END_TIME", "inf"))


def _longest_save(path: Path) -> float:
    try:
        seconds = float(parse_json(path.read_bytes())["save_s"])
        return seconds if math.isfinite(seconds) else 0.0
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or cut by a kill
        return 0.0
