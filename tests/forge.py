"""Processes that start with all libraries loaded: loading takes most of a start, and a suite needs hundreds.

`python forge.py FD` reads requests from a socket and answers with process ids. Each process is forked before any thread
exists, has a session of its own and goes on as `python WORDS` would, so it is a rank as srun starts one: no launcher.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: What a run imports, most of it late. Nothing of this project: its own imports are tested as they are.
LIBRARIES = (
    *("torch", "deepspeed", "torch._dynamo", "torch._inductor", "numpy", "sympy", "networkx", "av", "webdataset"),
    *("omegaconf", "pydantic", "einops", "tenacity", "safetensors.torch", "setuptools", "msgpack", "PIL.Image"),
    *("fsspec.implementations.local", "s3fs", "multiprocessing.spawn", "concurrent.futures.thread"),
    # DeepSpeed imports the first while it builds an engine, timm the second: longer than a run of ten steps takes.
    *("deepspeed.runtime.zero.muon.muon_optimizer", "wandb"),
)

#: Beginnings of variables that libraries look at while they are loaded: with others than the forge's a process is
#: started anew.
AT_LOADING = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "LD_", "MALLOC_", "DS_", "TORCH", "CUDA_")

PR_SET_CHILD_SUBREAPER = 36


class Forged(subprocess.Popen[str]):
    """`python WORDS`, forked. In all else a Popen: it has become a child of this process."""

    # In the place of the method that forks and execs; there is no other seam between the pipes and the process.
    def _execute_child(self, args: Sequence[str], *more: Any) -> None:
        _, _, _, _, cwd, env, _, _, _, *pipes = more[:15]
        stdin, _, _, stdout, _, stderr = pipes
        with open(os.devnull, "rb") as nothing:
            inherited = zip((stdin, stdout, stderr), (nothing.fileno(), 1, 2), strict=True)
            streams = [number if stream == -1 else stream for stream, number in inherited]
            self.pid = _forge().fork(list(args[1:]), dict(env), str(cwd or Path.cwd()), streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def start(
    words: Sequence[object], environ: Mapping[str, str], fork: bool = True, **options: Any
) -> subprocess.Popen[str]:
    """Start `python WORDS` in a session of its own; forked, where that makes no difference to it.

    What looks at command lines, its own or that of its parent, sees the forge's.
    """
    command = [sys.executable, *map(str, words)]
    alike = all(environ.get(name) == _environment().get(name) for name in {*environ, *os.environ} if _at_loading(name))
    kind = Forged if fork and alike and set(options) <= {"cwd", "stdout", "stderr"} else subprocess.Popen
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return kind(command, env=environ, text=True, start_new_session=True, **pipes)


def _at_loading(name: str) -> bool:
    return name.startswith(AT_LOADING) and name != "PYTHONPATH"


@functools.cache
def _environment() -> dict[str, str]:
    """Variables of the forge: one thread, no accelerator, as in tests/ranks.py; no stores, of which children know."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("FSSPEC", "PYTHONPATH"))}
    return plain | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


@functools.cache
def _forge() -> "Forge":
    return Forge()


class Forge:
    """The client's side: starts processes, from any thread. The server ends with the process that has this."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,
            )

    def fork(self, words: list[str], environ: dict[str, str], cwd: str, streams: list[int]) -> int:
        """Fork a process that goes on as `python WORDS`; returns its number, of a child of this process."""
        request = json.dumps({"words": words, "environ": environ, "cwd": cwd}).encode()
        with self._lock, adopting():
            socket.send_fds(self._socket, [request], streams)
            answer = self._socket.recv(64)
        assert answer, f"the forge has ended with {self._server.wait()}"
        return int(answer)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Take over, while it lasts, what a child forks and leaves alone: only a parent is told how a process ended."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def serve(requests: socket.socket) -> None:
    """Fork what is asked for until nobody is left to ask."""
    for name in LIBRARIES:
        importlib.import_module(name)
    # DeepSpeed collects garbage several times for each engine, a third of a second each where all libraries are walked
    # through.
    gc.collect()
    gc.freeze()
    while True:
        data, streams, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not data:
            return
        reading, writing = os.pipe()
        if os.fork() == 0:
            pid = os.fork()
            if pid == 0:
                become(json.loads(data), streams)
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.wait()  # its child is the client's now
        requests.send(os.read(reading, 64))
        for descriptor in (reading, writing, *streams):
            os.close(descriptor)


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Go on as the program; never returns."""
    code = 1
    try:
        os.setsid()
        # As a terminal starts it: under nohup, or behind `&`, this program ignores them, and a run goes by that.
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 256)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environ"])
        sys.path[:0] = filter(None, request["environ"].get("PYTHONPATH", "").split(os.pathsep))
        from fsspec.config import conf, set_conf_env

        set_conf_env(conf)  # it looks at the environment when it is imported
        code = run(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a program
        traceback.print_exc()
    finally:
        leave(code)


def run(words: list[str]) -> int:
    """Run `python WORDS`: a script, -m with a module, or -c with a program."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
    return 0


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
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]
    serve(socket.socket(fileno=int(sys.argv[1])))
