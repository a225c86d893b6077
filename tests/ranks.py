"""Programs that tests start on several ranks: without a launcher, at free ports, and never left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests import forge

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Variables of a process that trains here: no accelerator, one thread."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]  # ninja, for DeepSpeed's first start
    return dict(os.environ) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(
    words: Sequence[object], rank: int, ranks: int, port: int, environ: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start `python WORDS` as one of `ranks` that meet at a port; in a session of its own, to be killed as a whole."""
    group = {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return forge.start(words, environment() | group | (environ or {}), **options)


def start_ranks(words: Sequence[object], ranks: int, **options: Any) -> list[subprocess.Popen[str]]:
    """Start `python WORDS` on all ranks."""
    port = free_port()
    return [start_rank(words, rank, ranks, port, **options) for rank in range(ranks)]


def outputs_of(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 300) -> list[str]:
    """Wait for the end of all processes; what each of them printed."""
    try:
        # At once: a rank whose pipe is full waits for its reader, and the others in a collective for it.
        with ThreadPoolExecutor(len(processes)) as pool:
            return list(pool.map(lambda process: process.communicate(timeout=timeout_s)[0], processes))
    finally:
        for process in processes:
            kill_session(process)


def run_ranks(words: Sequence[object], ranks: int, timeout_s: float = 300) -> list[str]:
    """Run `python WORDS` on all ranks, which must end well; what each of them printed."""
    processes = start_ranks(words, ranks)
    outputs = outputs_of(processes, timeout_s)
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)[-8000:]
    return outputs


def kill_session(process: subprocess.Popen[str]) -> None:
    """kill -9 of a process and all that it started, which share its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
