"""Python stacks of this process and of its data workers, written into the run folder."""

import faulthandler
import logging
import multiprocessing
import os
import platform
import signal
import time
from pathlib import Path

from pretrain.runtime.activity import current

logger = logging.getLogger(__name__)

#: Environment variable through which a rank tells its data workers where to write: FOLDER/rank_00003.
VARIABLE = "TUBELET_STACKS"

#: Asks a data worker for its stacks; its watching thread takes it (pretrain/data/stream.py).
SIGNAL = signal.SIGUSR2


def announce(folder: Path, rank: int) -> None:
    """Tell the data workers that are started from now on where their stacks belong."""
    os.environ[VARIABLE] = str(folder / "stacks" / f"rank_{rank:05d}")


def dump(step: int) -> Path:
    """Append the stacks of all threads to stacks/rank_NNNNN_step_NNNNNNNN.txt, and ask the data workers for theirs."""
    path = Path(f"{os.environ[VARIABLE]}_step_{step:08d}.txt")
    write(path, f"step {step}")
    for worker in multiprocessing.active_children():
        if worker.pid is not None and takes_signal(worker.pid):
            os.kill(worker.pid, SIGNAL)
    return path


def dump_worker(worker: int) -> None:
    """Append the stacks of a data worker, from inside of it, to stacks/rank_NNNNN_worker_N.txt."""
    if VARIABLE in os.environ:
        write(Path(f"{os.environ[VARIABLE]}_worker_{worker}.txt"), f"data worker {worker}")


def write(path: Path, title: str) -> None:
    """Append the stacks of all threads of this process under a line that tells when, where and what it was doing."""
    moment = current()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        where = f"host {platform.node()}, pid {os.getpid()}"
        file.write(f"{now} {title}, {where}: {moment.phase} for {moment.seconds:.0f} s\n")
        # faulthandler writes to the descriptor, past Python's buffer: the title would come after its stacks.
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")


def takes_signal(pid: int) -> bool:
    """Tell whether a process holds SIGNAL for a thread that waits for it: to any other it would be the end.

    A worker that has just been started, or a process of a library, may not.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    blocked = next((int(line.split()[1], 16) for line in lines if line.startswith("SigBlk")), 0)
    return bool(blocked >> (SIGNAL - 1) & 1)
