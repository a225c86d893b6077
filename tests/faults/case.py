"""A fault in a phase: what is promised, how it is injected, and running it."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.lab import STEPS, Attempt, Lab, NotKept, until
from tests.toy_run import Toy

PHASES = ("start", "first step", "mid-epoch", "epoch border", "save", "upload", "resume")

#: Starts of the same command before it is given up.
MOST_STARTS = 6

#: What must be the same in each step's record.
SAME = ("train/loss", "optim/grad_norm", "optim/lr")


def nothing(lab: Lab, attempt: Attempt) -> None:
    """No fault from outside."""


def unchanged(lab: Lab) -> None:
    """Nothing to prepare, nothing to mend."""


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        fault: What happens.
        phase: When.
        promise: What the documentation says of it.
        inject: Does it, while the run is held in the phase.
        ranks: Of the first start, and of the next ones where `next_ranks` says nothing else.
        launcher: Whether the first start goes through `deepspeed`.
        held: Whether the run is held in the phase; False: the fault is there before the start.
        hold_rank: The rank that is held.
        codes: Exit codes that the processes which were not struck may have; None: any but 0.
        says: Regular expression that the output or summary.json of the first start must hold.
        options: Further overrides of all starts; `next_options` those of the starts after the fault.
        before: Done before the first start.
        mend: Done before the second start.
        accident: "nan": instead of being held, the run has a loss that is none.
        same: Whether the curve is that of the undisturbed run; a number is the tolerance; None: not compared.
        check: Further promises; raises NotKept.
        group: Faults of one group are one family in the table.
    """

    fault: str
    phase: str
    promise: str
    inject: Callable[[Lab, Attempt], None] = nothing
    ranks: int = 1
    next_ranks: int | None = None
    launcher: bool = False
    held: bool = True
    hold_rank: int = 0
    codes: tuple[int, ...] | None = (0,)
    says: str = ""
    options: tuple[str, ...] = ()
    next_options: tuple[str, ...] = ()
    before: Callable[[Lab], None] = unchanged
    mend: Callable[[Lab], None] = unchanged
    accident: str = "hold"
    same: float | None = 0.0
    check: Callable[[Lab], None] = unchanged
    needs: str = ""

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.fault}, {self.phase}, {self.ranks} rank{'s' * (self.ranks > 1)}"


@dataclass(frozen=True)
class Outcome:
    """What was seen."""

    case: Case
    kept: bool
    seen: str
    recovery_s: float | None
    seconds: float


class Undisturbed:
    """Runs that were left alone, and folders of runs that were killed after 10 of 15 steps; each made once."""

    def __init__(self, folder: Path, toy: Toy) -> None:
        self._folder, self._toy = folder, toy
        self._locks = {ranks: threading.Lock() for ranks in (1, 2)}
        self._curves: dict[int, list[list[float]]] = {}

    def curve(self, ranks: int) -> list[list[float]]:
        """Loss, gradient norm and learning rate of each step."""
        with self._locks[ranks]:
            if ranks not in self._curves:
                lab = Lab(self._folder / f"whole_{ranks}", self._toy, ranks, ())
                codes = lab.start().wait()
                lab.close()
                if codes != [0] * ranks:
                    raise NotKept(f"the undisturbed run failed: {lab.attempts[0].output[-3000:]}")
                self._curves[ranks] = curve_of(lab)
            return self._curves[ranks]

    def killed(self, ranks: int) -> Path:
        """Run folder of a run that was killed in step 11, with checkpoints of steps 4 and 8."""
        folder = self._folder / f"killed_{ranks}"
        with self._locks[ranks]:
            if not folder.exists():
                lab = Lab(folder, self._toy, ranks, ())
                lab.hold_in("later")
                attempt = lab.start()
                lab.held()
                until((lab.run / "checkpoints" / "step_00000008").exists, "the checkpoint of step 8", attempt)
                lab.close()
        return folder / "run"


def curve_of(lab: Lab) -> list[list[float]]:
    """Loss, gradient norm and learning rate of each step."""
    return [[record.get(key, float("nan")) for key in SAME] for record in lab.records()]


def run_case(case: Case, folder: Path, toy: Toy, undisturbed: Undisturbed) -> Outcome:
    """Run a case; whatever it leaves is cleared away, except its folder where a promise was not kept."""
    began = time.monotonic()
    lab = Lab(folder, toy, case.ranks, case.options)
    try:
        expected = undisturbed.curve(case.ranks)
        seen = _disturb(case, lab, undisturbed)
        _check_curve(case, lab, expected)
        case.check(lab)
        kept, recovery_s = True, lab.first_step_after() if case.accident == "hold" else None
    except NotKept as problem:
        kept, seen, recovery_s = False, str(problem), None
    finally:
        lab.close()
    if kept:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(case, kept, seen, recovery_s, time.monotonic() - began)


def _disturb(case: Case, lab: Lab, undisturbed: Undisturbed) -> str:
    """Start, strike, and start again until it is done; what was seen, in words."""
    if case.phase == "resume":
        lab.take_over(undisturbed.killed(case.ranks))
    if case.phase == "upload":
        lab.hold_upload()
    elif case.held:
        lab.hold_in(case.phase, case.hold_rank, case.accident)
    case.before(lab)
    lab.strike()
    attempt = lab.start(case.launcher)
    if case.held:
        if case.accident == "hold":
            lab.held()
        lab.strike()
        case.inject(lab, attempt)
        lab.release()
    codes = attempt.wait()
    _check_first(case, lab, attempt)
    said = _words(codes, attempt)
    if case.next_ranks is not None:
        lab.ranks = case.next_ranks
    lab.options += case.next_options
    case.mend(lab)
    while any(codes):
        lab.check_nobody_left()
        lab.check_checkpoints()
        if len(lab.attempts) == MOST_STARTS:
            raise NotKept(f"still not done after {MOST_STARTS} starts; {attempt.output[-1500:]}")
        attempt = lab.start()
        codes = attempt.wait()
        continued = re.search(r"continuing from .*, step (\d+)", attempt.output)
        said += f"; started again, first step {int(continued[1]) + 1}" if continued else "; started again"
        if any(code not in (0, 75) for code in codes):
            raise NotKept(f"start {len(lab.attempts)} ended with {codes}: {attempt.output[-1500:]}")
    lab.check_nobody_left()
    if lab.check_checkpoints() != STEPS:
        raise NotKept("no checkpoint of the last step")
    return said


def _words(codes: list[int], attempt: Attempt) -> str:
    """Exit codes for people."""
    words = [f"killed by signal {-code}" if code < 0 else f"exit code {code}" for code in codes]
    return " and ".join(dict.fromkeys(words)) if any(codes) else "went on to the end"


def _check_first(case: Case, lab: Lab, attempt: Attempt) -> None:
    codes = [code for at, code in enumerate(attempt.codes) if at not in attempt.struck]
    wrong = [code for code in codes if (code == 0 if case.codes is None else code not in case.codes)]
    if wrong:
        raise NotKept(f"exit codes {codes} instead of {case.codes}: {attempt.output[-1500:]}")
    summary = lab.run / "summary.json"
    text = attempt.output + (json.dumps(json.loads(summary.read_text())) if summary.exists() else "")
    if case.says and not re.search(case.says, text, re.S):
        raise NotKept(f"the output does not say {case.says!r}: {attempt.output[-1500:]}")


def _check_curve(case: Case, lab: Lab, expected: list[list[float]]) -> None:
    steps = [record["step"] for record in lab.records()]
    if steps != list(range(1, STEPS + 1)):
        raise NotKept(f"metrics.jsonl has the steps {steps}")
    if case.same is None:
        return
    for step, (here, there) in enumerate(zip(curve_of(lab), expected, strict=True), start=1):
        worst = max(abs(one - other) for one, other in zip(here, there, strict=True))
        if not worst <= case.same:
            raise NotKept(f"step {step}: {dict(zip(SAME, here, strict=True))} instead of {there}")
