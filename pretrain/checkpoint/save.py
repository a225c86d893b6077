"""Writing a checkpoint: under a temporary name, manifest last, published by a rename.

    .saving_step_00000100/
        deepspeed/…          weights, optimiser states, loss scale: one or two files a rank, by DeepSpeed
        latest, zero_to_fp32.py   DeepSpeed's own tool that merges the shards, usable in place
        state.json           step, data position, recipe, versions, data fingerprints
        recipe.yaml          the recipe, for people
        manifest.json        sizes and hashes

The ranks wait until DeepSpeed's files are written. Hashing, publishing and retention go on in a thread while training
continues; ranks tell rank 0 their hashes through files, because collectives are not safe outside of the main thread.
"""

import json
import logging
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import FileEntry, Manifest, describe_file, write_durably, write_manifest
from pretrain.errors import CheckpointError
from pretrain.runtime.process_group import Ranks, from_first

logger = logging.getLogger(__name__)

TAG = "deepspeed"
STATE = "state.json"
RECIPE = "recipe.yaml"

#: Longest time that rank 0 waits for the hashes of the others, seconds.
HASH_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds beside DeepSpeed's files: `state` is JSON, `recipe_text` YAML for people.

    `keep` are the steps whose checkpoints must not be removed when this one is published.
    """

    step: int
    state: dict[str, Any]
    recipe_text: str
    keep: set[int] = field(default_factory=set)


class Saver:
    """Saves, publishes and retires the checkpoints of one run. Every rank has one and calls it at the same steps.

    Args:
        root: The run's folder of checkpoints, visible to all ranks.
        ranks: This process among all.
        keep_last: Newest checkpoints that stay.
        keep_every_steps: One checkpoint of every so many steps stays for good; None: none.
    """

    def __init__(self, root: Path, ranks: Ranks, keep_last: int, keep_every_steps: int | None) -> None:
        self.root, self.ranks = root, ranks
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, engine: Any, content: Content) -> float:
        """Write the checkpoint of a DeepSpeed engine and start publishing it; returns the seconds that it took.

        Raises:
            CheckpointError: this save, or publishing the one before, failed.
        """
        self.wait()
        started = time.monotonic()
        folder = folders.working_folder_of(self.root, content.step)
        try:
            files = self._write(engine, folder, content)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: could not be written ({type(error).__name__}: {error}); checkpoints published before are "
                "untouched. Make room or fix the file system, then start the same command again"
            ) from error
        self._thread = threading.Thread(target=self._publish, args=(folder, content, files), name="publish")
        self._thread.start()
        return time.monotonic() - started

    def wait(self) -> None:
        """Return when the newest checkpoint is published on rank 0, and this rank's part of it is done elsewhere."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"{self.root}: publishing a checkpoint failed: {error}") from error

    def _write(self, engine: Any, folder: Path, content: Content) -> list[str]:
        """DeepSpeed's files and ours; returns the paths of all, relative to the folder."""
        if self.ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / STATE).write_text(json.dumps(content.state, indent=1), encoding="utf-8")
            (folder / RECIPE).write_text(content.recipe_text, encoding="utf-8")
        dist.barrier()
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=True)
        return from_first(self.ranks, _list_files(folder) if self.ranks.first else [])

    def _publish(self, folder: Path, content: Content, files: list[str]) -> None:
        step = content.step
        try:
            mine = [describe_file(folder, path) for path in files[self.ranks.rank :: self.ranks.world_size]]
            if not self.ranks.first:
                write_durably(_hashes_file(folder, self.ranks.rank), json.dumps([asdict(entry) for entry in mine]))
                return
            entries = mine + _hashes_of_others(folder, self.ranks.world_size)
            write_manifest(folder, Manifest(step, tuple(sorted(entries, key=lambda entry: entry.path))))
            published = folders.publish(self.root, step)
            removed = folders.apply_retention(self.root, self.keep_last, self.keep_every_steps, content.keep)
            size = sum(entry.bytes for entry in entries)
            logger.info("checkpoint %s published, %.1f MB; removed %s", published, size / 1e6, removed or "none")
        except BaseException as error:  # raised again in the main thread by wait()
            self._error = error


def _list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _hashes_file(folder: Path, rank: int) -> Path:
    return folder / f".hashes_{rank:05d}.json"


def _hashes_of_others(folder: Path, world_size: int) -> list[FileEntry]:
    """Wait for the hashes of ranks 1 and up, read and remove them."""
    entries: list[FileEntry] = []
    deadline = time.monotonic() + HASH_TIMEOUT_S
    for rank in range(1, world_size):
        path = _hashes_file(folder, rank)
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(f"{path}: rank {rank} did not deliver its hashes within {HASH_TIMEOUT_S:.0f} s")
            time.sleep(0.02)
        entries += [FileEntry(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        path.unlink()
    return entries
