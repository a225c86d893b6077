"""One training that is disturbed: its command, holding it in a phase, its storage, and what must hold in the end."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import servers
from tests.faults.proxy import FaultProxy
from tests.forge import Forged, start
from tests.ranks import environment, free_port
from tests.toy_run import Toy

#: Steps of the run, and those between two checkpoints: 4, 8, 12, and 15 at the end.
STEPS, SAVE_EVERY = 15, 4
OPTIONS = (
    *("schedule.epochs=3", f"checkpoint.every_steps={SAVE_EVERY}", "zero.stage=2", "data.workers=0"),
    *("watchdog.leave_s=10", "watchdog.beat_s=2", "watchdog.join_s=240"),
)

#: How long anything may take on a machine that has other work to do, seconds.
PATIENCE_S = 240.0

#: Requests that upload a checkpoint: the first is held, since later ones are left out where steps are fast.
HELD_UPLOAD = r"(PUT|POST) .*step_0"

RANK = str(Path(__file__).with_name("rank.py"))


class NotKept(Exception):
    """Something that was promised did not hold."""


class Attempt:
    """One start of the command."""

    def __init__(self, processes: list[Any], outputs: list[Path]) -> None:
        self.processes, self._outputs = processes, outputs
        self.began = time.monotonic()
        self.struck: set[int] = set()

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each process."""
        return [process.poll() for process in self.processes]

    @property
    def output(self) -> str:
        """All that was printed."""
        return "\n".join(path.read_text(errors="replace") for path in self._outputs if path.exists())

    def members(self) -> dict[int, str]:
        """Command line by id of each process that it started and that has not ended."""
        found: dict[int, str] = {}
        for process in self.processes:
            found |= session(process.pid)
        return found

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        if isinstance(self.processes[0], Forged):
            return [process.pid for process in self.processes]
        lines = {pid: line for pid, line in self.members().items() if "--local_rank=" in line and "spawn" not in line}
        own = {pid: int(re.search(r"--local_rank=(\d+)", line)[1]) for pid, line in lines.items()}  # type: ignore[index]
        return sorted(own, key=lambda pid: own[pid]) or [self.processes[0].pid]

    def workers(self) -> list[int]:
        """Process ids of data workers."""
        return [pid for pid, line in self.members().items() if "multiprocessing.spawn" in line]

    def wait(self) -> list[int]:
        """Exit codes, when all have ended."""
        until(lambda: None not in self.codes, f"the end of the command; exit codes {self.codes}", self)
        return [code for code in self.codes if code is not None]

    def kill(self) -> None:
        """SIGKILL all of it."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Lab:
    """The folder, store and processes of one disturbed run.

    Attributes:
        run: Its run folder.
        attempts: The starts of its command so far.
        seen: (when, attempt, step) of each line of metrics.jsonl, as it came.
    """

    def __init__(self, folder: Path, toy: Toy, ranks: int, options: tuple[str, ...], look_s: float = 0.05) -> None:
        self.folder, self.toy = folder, toy
        self.ranks, self.options = ranks, list(options)
        self.run = folder / "run"
        self.hold_folder = folder / "hold"
        self.hold: dict[str, Any] = {}
        self.environ: dict[str, str] = {}
        self.attempts: list[Attempt] = []
        self.seen: list[tuple[float, int, int]] = []
        self.server: servers.S3Server | None = None
        self.proxy: FaultProxy | None = None
        self.undo: list[Callable[[], None]] = []
        self.struck_at = 0.0
        self._closed, self._look_s = False, look_s
        self._known: list[int] = []
        self._looking = threading.Lock()
        self.hold_folder.mkdir(parents=True)
        threading.Thread(target=self._watch, daemon=True).start()

    # -- the command ------------------------------------------------------------------------------------------------

    def start(self, launcher: bool = False) -> Attempt:
        """Start the command: ranks as srun would, or by the `deepspeed` launcher."""
        words = ["--recipe", str(self.toy.recipe), f"run.dir={self.run}", *OPTIONS, *self.options]
        environ = self.environ | ({"HOLD": json.dumps(self.hold)} if self.hold else {})
        number = len(self.attempts)
        if launcher:
            attempt = self._launch(words, environ, self.folder / f"output_{number}.txt")
        else:
            outputs = [self.folder / f"output_{number}_rank_{rank}.txt" for rank in range(self.ranks)]
            common = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            common = environment() | environ | common
            processes = [
                _rank(words, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, outputs[rank])
                for rank in range(self.ranks)
            ]
            attempt = Attempt(processes, outputs)
        self.attempts.append(attempt)
        return attempt

    def _launch(self, words: list[str], environ: dict[str, str], output: Path) -> Attempt:
        front = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(self.ranks)]
        front += ["--master_port", str(free_port())]
        with open(output, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *front, RANK, *words],
                env=environment() | environ,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Attempt([process], [output])

    def take_over(self, run: Path) -> None:
        """Begin with a copy of another run's folder."""
        with self._looking:
            shutil.copytree(run, self.run)
            self._known = [record["step"] for record in self.records()]

    def hold_in(self, phase: str, rank: int = 0, what: str = "hold") -> None:
        """Starts from now on stop once in this phase; or, what="nan", have a loss that is none."""
        self.hold = {"phase": phase, "rank": rank, "folder": str(self.hold_folder), "what": what}

    def held(self) -> None:
        """Return when the held rank, or the held request, has come to its phase."""
        attempt, reached = self.attempts[-1], (self.hold_folder / "reached").exists
        until(lambda: reached() or self.upload_held or None not in attempt.codes, "the phase of the fault", attempt)
        if not reached() and not self.upload_held:
            raise NotKept(f"ended with {attempt.codes} before the phase of the fault: {attempt.output[-1500:]}")

    @property
    def upload_held(self) -> bool:
        """Whether a request that uploads the checkpoint waits in the proxy."""
        return self.proxy is not None and self.proxy.only == HELD_UPLOAD and self.proxy.seen["hung"] > 0

    def release(self) -> None:
        """Let the held rank, or request, go on."""
        (self.hold_folder / "go").touch()
        if self.proxy is not None and self.proxy.only == HELD_UPLOAD:
            self.proxy.clear()

    def hold_upload(self) -> None:
        """The store does not answer when a checkpoint comes."""
        proxy = self.open_store()
        self.options += [f"checkpoint.upload=s3://{servers.BUCKET}/run", "checkpoint.upload_deadline_s=120"]
        proxy.only, proxy.hangs = HELD_UPLOAD, True

    def strike(self) -> None:
        """The fault strikes now."""
        self.struck_at = time.monotonic()

    # -- storage ----------------------------------------------------------------------------------------------------

    def open_store(self, timeout_s: float = 2) -> FaultProxy:
        """A real S3 server with the shards, and a proxy between it and the command."""
        # Before the server starts: it remembers for minutes what lies in a folder.
        shutil.copytree(self.toy.folder / "shards", self.folder / "store" / servers.BUCKET / "toy")
        self.server = servers.Rclone(self.folder / "store")
        self.server.start()
        self.proxy = FaultProxy(self.server.port)
        self.environ |= servers.environment(self.proxy.port, timeout_s)
        return self.proxy

    def uploaded(self) -> list[str]:
        """Checkpoints that are complete in the store."""
        root = self.folder / "store" / servers.BUCKET / "run" / "checkpoints"
        return sorted(path.parent.name for path in root.glob("*/manifest.json"))

    def mount(self, megabytes: int) -> None:
        """Put the run folder on a file system of its own."""
        self.run.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "faults", str(self.run)]
        subprocess.run(command, check=True, capture_output=True)
        self.undo.append(lambda: subprocess.run(["umount", "-l", str(self.run)], check=False, capture_output=True))

    def remount(self, how: str) -> None:
        """Change how that file system may be used: ro, rw."""
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.run)], check=True, capture_output=True)

    def fill(self) -> None:
        """Leave no room on it."""
        with open(self.run / "ballast", "ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass

    # -- what holds in the end --------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def check_nobody_left(self) -> None:
        """No process of any start is alive."""
        until(lambda: not any(attempt.members() for attempt in self.attempts), "the end of all processes", None)

    def check_checkpoints(self) -> int:
        """Every published checkpoint verifies; returns the step of the newest, 0: none."""
        from pretrain.checkpoint import folders, manifest

        published = folders.published(self.run / "checkpoints")
        torn = [problem for folder in published for problem in manifest.problems(folder)]
        if torn:
            raise NotKept(f"torn checkpoint: {torn[0]}")
        return max(map(folders.step_of, published), default=0)

    def first_step_after(self) -> float | None:
        """Seconds from the fault to the first step that the last start has done since; None: no step followed."""
        began = self.attempts[-1].began if len(self.attempts) > 1 else 0.0
        later = [when for when, number, _ in self.seen if when > max(self.struck_at, began)]
        return min(later) - self.struck_at if later else None

    def close(self) -> None:
        """Leave nothing behind."""
        self._closed = True
        for attempt in self.attempts:
            attempt.kill()
        for undo in reversed(self.undo):
            undo()
        if self.proxy is not None:
            self.proxy.close()
        if self.server is not None:
            self.server.kill()

    def _watch(self) -> None:
        while not self._closed:
            with self._looking, contextlib.suppress(OSError, ValueError):
                steps = [record["step"] for record in self.records()]
                if len(steps) < len(self._known):  # a start has dropped the steps that it runs again
                    self._known = steps
                now = time.monotonic()
                self.seen += [(now, len(self.attempts) - 1, step) for step in steps[len(self._known) :]]
                self._known = steps
            time.sleep(self._look_s)


def _rank(words: list[str], environ: dict[str, str], output: Path) -> "subprocess.Popen[str]":
    with open(output, "ab") as log:
        return start([RANK, *words], environ, stdout=log)


def session(leader: int) -> dict[int, str]:
    """Command lines by process of a session; what has ended does not count."""
    found = subprocess.run(["ps", "-ww", "-o", "pid=,stat=,args=", "-s", str(leader)], capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in found.stdout.splitlines()]
    return {int(pid): command for pid, state, command in lines if not state.startswith("Z")}


def until(condition: Callable[[], Any], what: str, attempt: Attempt | None, patience_s: float = PATIENCE_S) -> None:
    """Wait for a condition; NotKept when it does not come, or when the command has ended before."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            tail = attempt.output[-1500:] if attempt else ""
            raise NotKept(f"waited {patience_s:.0f} s for {what} {tail}")
        time.sleep(0.05)
