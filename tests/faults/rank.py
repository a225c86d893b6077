"""A rank of a training, as launch/pretrain.py starts it, that is held in the phase in which a fault is to strike.

Timing from outside alone would hit a phase of milliseconds by luck. HOLD is {"phase", "rank", "folder", "what"}: there
the rank leaves the file `reached`, once in all starts, and goes on when the file `go` is there, if it still lives.
"""

import errno
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: Phases by the number of steps that are done in them; the toy has 5 steps an epoch.
STEPS_DONE = {"first step": 0, "epoch border": 5, "mid-epoch": 7, "later": 10}

#: The checkpoint whose save is held.
HELD_SAVE = "step_00000008"


class Hold:
    """Waits in a phase, once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self) -> None:
        try:
            os.close(os.open(self._folder / "reached", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        while not (self._folder / "go").exists():
            time.sleep(0.02)


def before(module: Any, name: str, do: Callable[..., None]) -> None:
    """Have `do` called with the arguments of a function, before each call of it."""
    plain = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        do(*args, **kwargs)
        return plain(*args, **kwargs)

    setattr(module, name, wrapped)


def arm(phase: str, act: Callable[[], None]) -> None:
    """Have `act` called whenever this process comes to a phase."""
    from pretrain.engine import assemble, loop

    if phase == "start":
        before(loop, "check_hosts", lambda *_: act())
    elif phase == "resume":
        before(assemble, "load", lambda *_: act())
    elif phase == "save":
        from pretrain.checkpoint import save

        before(save, "describe_file", lambda folder, _: act() if HELD_SAVE in folder.name else None)
    elif phase == "publish":
        from pretrain.checkpoint import folders

        before(folders, "publish", lambda _, step: act() if step == 8 else None)
    elif phase == "epoch border":  # before the first batch of the next epoch is fetched
        before(loop, "train_step", lambda _, done, __: act() if done == STEPS_DONE[phase] else None)
    else:
        arm_forward(STEPS_DONE[phase], lambda output: act() or output)  # type: ignore[func-returns-value]


def arm_forward(steps_done: int, change: Callable[[Any], Any]) -> None:
    """Have what the forward passes of one step return changed."""
    from pretrain.engine import loop
    from pretrain.objectives.videomae import VideoMAEObjective

    at: list[int] = []
    before(loop, "train_step", lambda _, done, __: at.append(done))
    plain = VideoMAEObjective.forward
    VideoMAEObjective.forward = (  # type: ignore[method-assign]
        lambda self, batch: change(plain(self, batch)) if at[-1] == steps_done else plain(self, batch)
    )


def poison_once(folder: Path) -> Callable[[Any], Any]:
    """A change that makes the first loss it sees NaN."""

    def change(output: Any) -> Any:
        try:
            os.close(os.open(folder / "reached", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return output
        return output._replace(loss=output.loss * float("nan"))

    return change


def share_without_flock(machine: str) -> None:
    """Make this a process on that machine, to which flock is unknown: the disks of one machine all have it."""
    from pretrain.runtime import lease, signs_of_life

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = refuse  # type: ignore[assignment]
    lease.kernel = signs_of_life.kernel = lambda: machine


def main(argv: list[str]) -> int:
    """Arm what HOLD says, then train."""
    from pretrain.commands import pretrain as command

    if machine := os.environ.get("NO_FLOCK"):
        share_without_flock(machine)
    hold = json.loads(os.environ.get("HOLD", "{}"))
    if hold and int(os.environ.get("RANK", "0")) == hold["rank"]:
        folder = Path(hold["folder"])
        if hold["what"] == "nan":
            arm_forward(STEPS_DONE[hold["phase"]], poison_once(folder))
        else:
            arm(hold["phase"], Hold(folder))
    assert threading.current_thread() is threading.main_thread()
    return command.main(argv)


if __name__ == "__main__":  # spawned data workers read this file again
    root = str(ROOT)
    sys.path[:] = [root, *(path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent)]
    sys.exit(main(sys.argv[1:]))
