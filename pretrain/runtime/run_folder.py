"""The run folder: its paths, the check that all ranks see it, and the lock that keeps it to one run at a time."""

import json
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pretrain.errors import TrainingError
from pretrain.runtime.disk import advice
from pretrain.runtime.environment import environment_report
from pretrain.runtime.lease import Lease, has_flock
from pretrain.runtime.process_group import Ranks, from_first, gather_objects

logger = logging.getLogger(__name__)

#: Folders in the run folder.
FOLDERS = ("checkpoints", "bad_samples", "pictures", "logs", "incidents", "heartbeats", "stacks")

#: File of the run folder that one run at a time has locked, where its file system has locks (else: lease.py).
LOCK = ".lock"

#: File of the run folder with the number of the Slurm job that has it (launch/slurm/job.sh).
HOLDER = ".holder"

#: How long a start waits for the ranks of a killed one to end, seconds.
LOCK_WAIT_S = 30.0


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        """Folder of one file of records a rank."""
        return self.root / "bad_samples"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def incidents(self) -> Path:
        return self.root / "incidents"

    @property
    def guard(self) -> Path:
        return self.root / "guard.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"


def open_folder(place: str, ranks: Ranks, beat_s: float) -> tuple[RunFolder, "Hold"]:
    """Create or reuse the run folder; it is held (by rank 0) until it is released or the process ends.

    Args:
        place: The recipe's run.dir.
        ranks: This process among all.
        beat_s: Seconds between two signs of life of the process that has it, where there is no flock.

    Raises:
        TrainingError: a URL, not visible to all ranks, or used by another run.
    """
    if "://" in place:
        raise TrainingError(f"run.dir: {place}: found a URL, allowed: a folder on a file system all ranks share")
    folder = RunFolder(Path(place).absolute())
    lock, problem = _acquire(folder.root, beat_s) if ranks.first else (None, "")
    if problem := from_first(ranks, problem):
        raise TrainingError(problem)
    _check_shared(folder.root, ranks)
    return folder, Hold(folder.root, lock)


def _acquire(root: Path, beat_s: float) -> tuple[FileLock | Lease | None, str]:
    """Take the folder; return the lock, or what is wrong, for all ranks to raise."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if wrong := [path for path in map(root.joinpath, FOLDERS) if os.path.lexists(path) and not path.is_dir()]:
            return None, f"run.dir: {', '.join(map(str, wrong))}: no folder, and a run needs one there; move it away"
        lock = _lock_of(root, beat_s)
        lock.acquire(timeout=LOCK_WAIT_S)
        (root / ".visible").write_text("", encoding="utf-8")
    except Timeout as error:
        who = "another process" if error.lock_file.startswith(str(root)) else error.lock_file
        return None, (
            f"{root} is in use by {who} (after {LOCK_WAIT_S:.0f} s): the run is still going on; wait, touch "
            f"{root}/stop to end it with a checkpoint, or give another run.dir"
        )
    except OSError as error:
        return None, f"run.dir: {root} can't be written: {advice(error)}"
    return lock, ""


def _lock_of(root: Path, beat_s: float) -> FileLock | Lease:
    if has_flock(root):
        return FileLock(root / LOCK)
    logger.warning("%s: its file system has no flock; a file that is renewed there says who has the folder", root)
    return Lease(root, beat_s)


def _check_shared(root: Path, ranks: Ranks) -> None:
    # Random: what an earlier start left behind, or a host's own folder of the same path, must not pass for it.
    token = from_first(ranks, secrets.token_hex(8))
    path = root / ".visible"
    if ranks.first:
        path.write_text(token, encoding="utf-8")
    # A barrier: nobody looks before rank 0 has written.
    from_first(ranks, None)
    sees = path.is_file() and path.read_text(encoding="utf-8") == token
    blind = [rank for rank, seen in enumerate(gather_objects(ranks, sees)) if not seen]
    if ranks.first:
        path.unlink()
    if blind:
        raise TrainingError(
            f"run.dir: ranks {blind} don't see what rank 0 writes to {root}; it must lie on a file system that all "
            "hosts share, because every rank writes its part of a checkpoint there"
        )


class Hold:
    """Hold of a run on its folder, which somebody may delete, rename or replace while it trains.

    Args:
        root: The folder.
        lock: Of it, taken; None on ranks other than the first, where nothing is done.
    """

    def __init__(self, root: Path, lock: FileLock | Lease | None) -> None:
        self._root, self._lock = root, lock
        if lock is not None:
            self._take_note()
            # Whose job this is: a job that waits for the folder must not touch the stop file of the one that has it.
            (root / HOLDER).write_text(os.environ.get("SLURM_JOB_ID", ""), encoding="utf-8")

    def release(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.release()

    def check(self) -> None:
        """End this process where it stood still and another one took the folder; to be called before it is written."""
        if isinstance(self._lock, Lease):
            self._lock.check()

    def renew(self) -> bool:
        """Take the folder again where it, or its lock, is not what it was; tell whether that was needed.

        Without this a run would go on writing into files that nobody finds, and another could start in its folder.

        Raises:
            TrainingError: another process has it by now.
            OSError: it can't be made again.
        """
        self.check()
        if self._lock is None or (self._known() and identity(self._file()) == self._lock_identity):
            return False
        what = "its lock was deleted or replaced" if self._known() else f"the folder was {self._whereabouts()}"
        logger.error("%s: %s while the run goes on; it is taken again, and all that follows is there", self._root, what)
        self._root.mkdir(parents=True, exist_ok=True)
        try:
            # The lock that is held is on a file that has no name any more, or another one.
            self._lock.release()
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise TrainingError(
                f"{self._root}: {what}, and another process has taken it since. This run ends; where the folder was "
                "renamed, its checkpoints are there"
            ) from error
        os.close(self._descriptor)
        self._take_note()
        return True

    def _take_note(self) -> None:
        self._identity, self._lock_identity = identity(self._root), identity(self._file())
        # Open as long as it is held: by this the system tells where a renamed folder is.
        self._descriptor = os.open(self._root, os.O_RDONLY)

    def _file(self) -> Path:
        return self._lock.path if isinstance(self._lock, Lease) else self._root / LOCK

    def _known(self) -> bool:
        return identity(self._root) == self._identity

    def _whereabouts(self) -> str:
        try:
            now = os.readlink(f"/proc/self/fd/{self._descriptor}")
        except OSError:
            return "deleted or renamed"
        return "deleted" if now.endswith(" (deleted)") else f"renamed to {now}"


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file or folder from another of the same name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def describe_start(folder: RunFolder, recipe_text: str) -> None:
    """Write recipe.yaml and environment.json, from rank 0."""
    (folder.root / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
    report = json.dumps(environment_report(), indent=1)
    (folder.root / "environment.json").write_text(report + os.linesep, encoding="utf-8")
