"""The run folder: its paths, the check that all ranks see it, and the lock that keeps it to one run at a time."""

import json
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from pretrain.errors import TrainingError
from pretrain.runtime.disk import advice
from pretrain.runtime.environment import environment_report
from pretrain.runtime.process_group import Ranks, from_first, gather_objects

logger = logging.getLogger(__name__)

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


def open_folder(place: str, ranks: Ranks) -> tuple[RunFolder, BaseFileLock]:
    """Create or reuse the run folder; the lock is held (by rank 0) until it is released or the process ends.

    Args:
        place: The recipe's run.dir.
        ranks: This process among all.

    Raises:
        TrainingError: a URL, not visible to all ranks, or used by another run.
    """
    if "://" in place:
        raise TrainingError(f"run.dir: {place}: found a URL, allowed: a folder on a file system all ranks share")
    folder = RunFolder(Path(place).absolute())
    lock = FileLock(folder.root / ".lock")
    problem = from_first(ranks, _acquire(lock, folder.root) if ranks.first else "")
    if problem:
        raise TrainingError(problem)
    _check_shared(folder.root, ranks)
    return folder, lock


def _acquire(lock: BaseFileLock, root: Path) -> str:
    """Take the lock; return what is wrong otherwise, for all ranks to raise."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_WAIT_S)
        (root / ".visible").write_text("", encoding="utf-8")
    except Timeout:
        return (
            f"{root} is in use by another process (after {LOCK_WAIT_S:.0f} s): the run is still going on; wait, touch "
            f"{root}/stop to end it with a checkpoint, or give another run.dir"
        )
    except OSError as error:
        return f"run.dir: {root} can't be written: {advice(error)}"
    return ""


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


def describe_start(folder: RunFolder, recipe_text: str) -> None:
    """Write recipe.yaml and environment.json, from rank 0."""
    (folder.root / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
    report = json.dumps(environment_report(), indent=1)
    (folder.root / "environment.json").write_text(report + os.linesep, encoding="utf-8")
