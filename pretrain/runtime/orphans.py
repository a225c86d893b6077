"""Watch over a rank's launcher: a killed one (kill -9) can't end its ranks itself, and none may outlive it."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

#: Seconds between two looks at whether the launcher still lives.
WATCH_S = 1.0

#: Variables that tell that a launcher started this process: deepspeed's, torchrun's, srun's.
LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")

#: Words in the command line of a launcher that starts another one on each host.
FRONT_ENDS = (b"deepspeed", b"torchrun", b"torch.distributed")


def die_with_launcher(environ: Mapping[str, str] | None = None) -> None:
    """End this process soon after the launcher that started it is gone, without cleaning up.

    Ranks without a launcher would train on, or wait for each other, and the next start would find the run folder in
    use. Called first of all, because a launcher that is gone already can hardly be told from init. Without a launcher
    nothing is watched: a parent shell may end while its job goes on.
    """
    environ = os.environ if environ is None else environ
    if not any(name in environ for name in LAUNCHERS) or _watching():
        return
    parent = os.getppid()
    if "CROSS_RANK" in environ and os.getsid(parent) != os.getsid(0):
        os._exit(1)  # deepspeed's launcher shares its ranks' session: it was killed before this process came so far
    front_end = parent_of(parent)
    watched = front_end if front_end is not None and _is_front_end(front_end) else None
    # Polled: PR_SET_PDEATHSIG follows the thread that forked and does not reach below the launcher.
    threading.Thread(target=_watch, args=(parent, watched), daemon=True, name="watch-launcher").start()


def parent_of(pid: int) -> int | None:
    """Find the parent of a process; None where it can't be told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name, in brackets, and may hold anything.
    return int(stat.rpartition(")")[2].split()[1])


def _is_front_end(pid: int) -> bool:
    """Tell whether `deepspeed` runs there, which starts a launcher of its own for this host and waits for it."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(word in command for word in FRONT_ENDS)


def _watching() -> bool:
    return any(thread.name == "watch-launcher" for thread in threading.enumerate())


def _watch(parent: int, front_end: int | None) -> None:
    while os.getppid() == parent and (front_end is None or parent_of(parent) == front_end):
        time.sleep(WATCH_S)
    # Not sys.exit, which ends this thread alone; and cleaning up would wait in a collective for ranks that are gone.
    os._exit(1)
