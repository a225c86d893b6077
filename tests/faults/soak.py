"""Half an hour of training with a fault about every minute: the same losses in the end, and memory that stays flat.

    python tests/faults/soak.py [--minutes 31] [--epochs 500] [--seed 0] [--json FILE]

Data come from a real S3 server, and checkpoints go there, through a proxy whose latency is steered so that it lasts
that long; it needs little of the machine. The undisturbed run reads the same shards from the disk.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent)]

from tests.faults.case import curve_of  # noqa: E402
from tests.faults.lab import Attempt, Lab, NotKept  # noqa: E402
from tests.toy_run import make_toy  # noqa: E402

#: Latency of each request to the store at first, and at most, seconds.
FIRST_LATENCY_S, MOST_LATENCY_S = 0.3, 6.0

#: Time after its first step from which a process's memory is expected to be flat, and the least length of a series from
#: there, seconds: what is allocated at a start would look like growth.
SETTLED_S, SERIES_S = 20.0, 90.0


class Soak:
    """The disturbed run.

    Attributes:
        events: What was done, when, and at which step.
        memory: Samples (seconds, bytes resident) of each process, by (start, rank); start -1 is the undisturbed run.
    """

    def __init__(self, lab: Lab, whole: Lab, seed: int, minutes: float, steps: int) -> None:
        self.whole = whole
        assert lab.proxy is not None and lab.server is not None
        self.lab, self.proxy, self.server = lab, lab.proxy, lab.server
        self.random = random.Random(seed)
        self.began, self._seconds, self._steps_in_all = time.monotonic(), 60 * minutes, steps
        self.latency_s = FIRST_LATENCY_S
        self.slow_down()
        self.events: list[dict[str, Any]] = []
        self.memory: dict[tuple[int, int], list[tuple[float, int]]] = {}
        self.codes: list[list[int]] = []
        threading.Thread(target=self._sample, daemon=True).start()

    def run(self) -> None:
        """Start again and again, with faults, until the run is done."""
        due = look = self._next()
        attempt = self.lab.start()
        while True:
            if None not in attempt.codes:
                self.codes.append(attempt.wait())
                self.lab.check_nobody_left()
                self.lab.check_checkpoints()
                if not any(self.codes[-1]):
                    return
                if len(self.codes) > 5 + 3 * len(self.events):
                    raise NotKept(f"ends by itself again and again: {attempt.output[-3000:]}")
                attempt = self.lab.start()
            if time.monotonic() > due and self._steps() > 0:
                self._strike(attempt)
                due = self._next()
            if time.monotonic() > look:
                look = time.monotonic() + 5
                self._steer()
            time.sleep(0.2)

    def slow_down(self) -> None:
        """The proxy without faults."""
        self.proxy.clear()
        self.proxy.latency_s = (0.5 * self.latency_s, 1.5 * self.latency_s)

    def _steer(self) -> None:
        """More latency where the run would be done too early, less where it would take too long."""
        left_s = self.began + self._seconds - time.monotonic()
        expected = self._steps_in_all * (1 - left_s / self._seconds)
        ahead = self._steps() > expected and left_s > 0
        self.latency_s = min(MOST_LATENCY_S, max(0.005, self.latency_s * (1.1 if ahead else 0.85)))
        self.slow_down()

    def _next(self) -> float:
        return time.monotonic() + self.random.uniform(40, 80)

    def _steps(self) -> int:
        return self.lab.seen[-1][2] if self.lab.seen else 0

    def _strike(self, attempt: Attempt) -> None:
        name = self.random.choice(sorted(FAULTS))
        event = {"at_s": round(time.monotonic() - self.began, 1), "fault": name, "step": self._steps()}
        self.events.append(event)
        print(json.dumps(event), flush=True)
        with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
            FAULTS[name](self, attempt)

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            number = len(self.lab.attempts) - 1
            started = [(-1, self.whole.attempts[0])] + ([(number, self.lab.attempts[-1])] if number >= 0 else [])
            watched = {(start, rank): one for start, way in started for rank, one in enumerate(way.processes)}
            for key, process in watched.items():
                with contextlib.suppress(OSError):
                    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                    if pages:  # a process that has ended and was not waited for has none
                        self.memory.setdefault(key, []).append((time.monotonic(), pages * page))
            time.sleep(1)

    def settled(self) -> dict[tuple[int, int], list[tuple[float, int]]]:
        """Samples of each process from a while after its first step on."""
        first: dict[int, float] = {}
        for number, lab in ((None, self.lab), (-1, self.whole)):
            for when, start, _ in lab.seen:
                first.setdefault(start if number is None else number, when)
        never = float("inf")
        return {
            key: [sample for sample in samples if sample[0] > first.get(key[0], never) + SETTLED_S]
            for key, samples in self.memory.items()
        }


def kill(rank: int) -> Callable[[Soak, Attempt], None]:
    """SIGKILL of a rank."""
    return lambda soak, attempt: os.kill(attempt.ranks()[rank], signal.SIGKILL)


def ask(number: signal.Signals) -> Callable[[Soak, Attempt], None]:
    """A signal to one rank, drawn."""
    return lambda soak, attempt: os.kill(soak.random.choice(attempt.ranks()), number)


def freeze(soak: Soak, attempt: Attempt) -> None:
    """A rank stands still for some seconds."""
    pid = soak.random.choice(attempt.ranks())
    os.kill(pid, signal.SIGSTOP)
    time.sleep(soak.random.uniform(2, 8))
    os.kill(pid, signal.SIGCONT)


def lose_newest(soak: Soak, attempt: Attempt) -> None:
    """The run dies, and its newest checkpoint is gone from the disk; it comes back from the store."""
    attempt.kill()
    attempt.wait()
    soak.lab.check_nobody_left()
    shutil.rmtree(max((soak.lab.run / "checkpoints").glob("step_*"), default=soak.lab.folder / "none"), True)


def for_a_while(**faults: Any) -> Callable[[Soak, Attempt], None]:
    """A fault of the store for some seconds."""

    def strike(soak: Soak, attempt: Attempt) -> None:
        for name, value in faults.items():
            setattr(soak.proxy, name, value)
        time.sleep(soak.random.uniform(5, 15))
        soak.slow_down()

    return strike


def restart_server(soak: Soak, attempt: Attempt) -> None:
    """The store is killed, and comes back."""
    soak.server.kill()
    time.sleep(soak.random.uniform(2, 10))
    soak.server.start()


FAULTS: dict[str, Callable[[Soak, Attempt], None]] = {
    "SIGKILL of rank 0": kill(0),
    "SIGKILL of rank 1": kill(1),
    "SIGTERM to a rank": ask(signal.SIGTERM),
    "SIGUSR1 to a rank": ask(signal.SIGUSR1),
    "stop file": lambda soak, attempt: (soak.lab.run / "stop").touch(),
    "a rank frozen for seconds": freeze,
    "SIGKILL of all, newest checkpoint lost": lose_newest,
    "store: half of the requests throttled": for_a_while(throttled=0.5),
    "store: a fifth of the answers cut": for_a_while(cut=0.2),
    "store: no answers": for_a_while(hangs=True),
    "store: connections refused": for_a_while(refuses=True),
    "store: killed and started again": restart_server,
}


def slope(samples: list[tuple[float, int]]) -> float:
    """Least-squares slope of a process's memory, MB a minute."""
    ages, sizes = zip(*samples, strict=True)
    return 60e-6 * statistics.linear_regression(ages, sizes).slope


def memory_report(soak: Soak) -> dict[str, Any]:
    """How the memory of processes went, of those that lived for long enough."""
    settled = soak.settled()
    long = {key: samples for key, samples in settled.items() if samples and samples[-1][0] - samples[0][0] > SERIES_S}
    slopes = {key: slope(samples) for key, samples in long.items()}
    disturbed = [value for key, value in slopes.items() if key[0] >= 0]
    # A leak that each start hands on, or a run that needs more the longer it goes, would show between starts.
    firsts = [samples[0][1] / 1e6 for key, samples in sorted(settled.items()) if samples and key[0] >= 0]
    return {
        "processes": len(soak.memory),
        "watched": len(disturbed),
        "longest_s": round(max((samples[-1][0] - samples[0][0] for samples in long.values()), default=0)),
        "slope_mb_per_min_median": round(statistics.median(disturbed), 3) if disturbed else None,
        "slope_mb_per_min_largest": round(max(disturbed), 3) if disturbed else None,
        "slope_mb_per_min_undisturbed": [round(value, 3) for key, value in slopes.items() if key[0] < 0],
        "first_start_mb": round(firsts[0], 1) if firsts else None,
        "last_start_mb": round(firsts[-1], 1) if firsts else None,
        "most_mb": round(max(size for samples in soak.memory.values() for _, size in samples) / 1e6, 1),
    }


def main() -> int:
    """Run it; 0 where the losses are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=31, help="how long it takes, about")
    parser.add_argument("--epochs", type=int, default=500, help="of five steps")
    parser.add_argument("--seed", type=int, default=0, help="draws faults and their times")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    toy = make_toy(folder / "toy")
    options = (f"schedule.epochs={arguments.epochs}", "checkpoint.every_steps=25", "log.every_steps=50")
    lab = Lab(folder / "soak", toy, 2, options, look_s=2)
    lab.open_store(timeout_s=2 * MOST_LATENCY_S)
    lab.options += ["data.sources.toy.shards=s3://bucket/toy", "checkpoint.upload=s3://bucket/run"]
    whole = Lab(folder / "whole", toy, 2, options, look_s=2)
    left_alone = whole.start()
    soak = Soak(lab, whole, arguments.seed, arguments.minutes, 5 * arguments.epochs)
    soak.run()
    minutes = (time.monotonic() - soak.began) / 60
    same = (
        left_alone.wait() == [0, 0] and curve_of(lab) == curve_of(whole) and len(curve_of(lab)) == 5 * arguments.epochs
    )
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "minutes": round(minutes, 1),
        "steps": 5 * arguments.epochs,
        "seed": arguments.seed,
        "faults": len(soak.events),
        "starts": len(lab.attempts),
        "uploaded": lab.uploaded(),
        "same_losses": same,
        "memory": memory_report(soak),
        "events": soak.events,
        "exit_codes": soak.codes,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for one in (lab, whole):
        one.close()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
