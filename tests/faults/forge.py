"""Ranks as children of a process that has loaded all libraries: loading takes most of a start, and hundreds are needed.

`python forge.py` reads requests from stdin, one JSON line each, and answers with process ids and exit codes on stdout.
Each rank is a process and a session of its own, like a task of srun, and has no launcher. It must be forked before any
thread exists, so the process that forks does nothing else.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: What a run imports, most of it late.
LIBRARIES = (
    *("torch", "deepspeed", "torch._dynamo", "torch._inductor", "av", "fsspec.implementations.local", "s3fs", "numpy"),
    *("pretrain.commands.program", "pretrain.engine.loop", "pretrain.objectives.videomae", "pretrain.models.videomae"),
    *("pretrain.data.decoders.pyav_reader", "sympy", "networkx", "setuptools"),
    "tests.faults.rank",
)


class Forged:
    """A forked rank."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code; -N: ended by signal N; None: alive."""
        return self.returncode


class Forge:
    """The client's side: starts ranks, from any thread."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._answered = threading.Condition()
        self._ranks: dict[int, Forged] = {}
        self._started: dict[int, Forged] = {}
        self._number = 0
        threading.Thread(target=self._read, daemon=True, name="forge").start()

    def start(self, argv: list[str], environ: dict[str, str], output: Path) -> Forged:
        """Fork a rank; what it prints goes to the file `output`."""
        assert self._server.stdin is not None
        with self._lock:
            self._number += 1
            number = self._number
            request = {"number": number, "argv": argv, "environ": environ, "output": str(output)}
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
        with self._answered:
            assert self._answered.wait_for(lambda: number in self._started, timeout=300), "the forge does not answer"
            return self._started.pop(number)

    def close(self) -> None:
        """End the server; ranks that are alive stay."""
        self._server.kill()
        self._server.communicate()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            answer = json.loads(line)
            with self._answered:
                if "code" in answer:
                    self._ranks.pop(answer["pid"]).returncode = answer["code"]
                else:
                    self._ranks[answer["pid"]] = self._started[answer["number"]] = Forged(answer["pid"])
                self._answered.notify_all()


def serve() -> None:
    """Fork what is asked for, tell what has ended, until stdin is closed."""
    for name in LIBRARIES:
        importlib.import_module(name)
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    answers = os.fdopen(os.dup(1), "w")
    pending = b""
    alive = 0
    while True:
        if select.select([requests], [], [], 0.02)[0]:
            data = requests.read(1 << 16)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    become(request)
                alive += 1
                answer(answers, {"number": request["number"], "pid": pid})
        while alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            alive -= 1
            answer(answers, {"pid": pid, "code": os.waitstatus_to_exitcode(status)})


def answer(stream: Any, content: dict[str, int]) -> None:
    """One line for the client."""
    stream.write(json.dumps(content) + "\n")
    stream.flush()


def become(request: dict[str, Any]) -> None:
    """Go on as the rank; never returns."""
    code = 1
    try:
        os.setsid()
        # As a terminal starts it: under nohup, or behind `&`, this program ignores them, and a run goes by that.
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 64)
        os.environ.update(request["environ"])
        from fsspec.config import conf, set_conf_env

        from tests.faults import rank

        set_conf_env(conf)  # it looks at the environment when it is imported
        # Data workers are spawned with the main module of their parent.
        sys.modules["__main__"].__dict__.update(__file__=rank.__file__)
        sys.argv = [rank.__file__, *request["argv"]]
        code = rank.main(request["argv"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a program
        traceback.print_exc()
    finally:
        leave(code)


def leave(code: int) -> None:
    """End as an interpreter does: with the hooks of the libraries, but without the forge's own end."""
    import atexit
    import logging

    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        logging.shutdown()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent)]
    serve()
