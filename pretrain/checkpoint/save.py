"""Writing a checkpoint: under a temporary name, manifest last, published by a rename.

    .saving_step_00000100/
        deepspeed/…          weights, averages, optimiser states, loss scale: one or two files a rank, by DeepSpeed
        rank_state/…         queues and banks: a file a rank, where the objective has any
        latest, zero_to_fp32.py   DeepSpeed's own tool that merges the shards, usable in place
        state.json           step, data position, recipe, versions, data fingerprints
        recipe.yaml          the recipe, for people
        manifest.json        sizes and hashes

Training waits while states are copied in memory; a thread writes, makes durable, hashes and publishes them. A save that
fails leaves the checkpoints before it as they are, is told at once, and is tried again when the next one is due.
"""

import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import folders
from pretrain.checkpoint.collect import Collected, collect
from pretrain.checkpoint.manifest import FileEntry, Manifest, describe_file, write_manifest
from pretrain.checkpoint.rank_messages import RankMessages
from pretrain.checkpoint.rank_state import RankState, digests, unequal, write_rank_state
from pretrain.checkpoint.restore import open_remote
from pretrain.checkpoint.snapshot import HostCopies
from pretrain.checkpoint.upload import Uploader
from pretrain.errors import CheckpointError
from pretrain.recipe.schema import Checkpoint
from pretrain.runtime.disk import advice
from pretrain.runtime.process_group import Ranks, from_first, gather_objects
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

TAG = "deepspeed"
STATE = "state.json"
RECIPE = "recipe.yaml"

#: Longest time that rank 0 waits for the parts of the others, and they for its verdict, seconds.
PARTS_TIMEOUT_S = 3600.0

#: Pause before the last checkpoint of a run is tried again, seconds.
AGAIN_S = 10.0


@dataclass(frozen=True)
class Content:
    """Content of a checkpoint beside DeepSpeed's files: `state` is JSON, `recipe_text` YAML for people.

    `keep` are the steps whose checkpoints must not be removed when this one is published; `rank_state` is what the
    objective keeps on this rank beside its weights, with the same names and rules on all ranks.
    """

    step: int
    state: dict[str, Any]
    recipe_text: str
    keep: set[int] = field(default_factory=set)
    rank_state: Mapping[str, RankState] = field(default_factory=dict)


class Saver:
    """Saver of one run: writes, publishes and retires checkpoints. Every rank has one and calls it at the same steps.

    Args:
        root: The run's folder of checkpoints, visible to all ranks.
        ranks: This process among all.
        options: The recipe's section.
        keep_every_steps: One checkpoint of every so many steps stays for good; None: none.
        messages: those between the ranks' threads.
        uploader: Takes published checkpoints to an object store; None: they stay where they are.
    """

    def __init__(
        self,
        root: Path,
        ranks: Ranks,
        options: Checkpoint,
        keep_every_steps: int | None,
        messages: RankMessages,
        uploader: Uploader | None = None,
    ) -> None:
        self.root, self.ranks, self._options = root, ranks, options
        self._keep_every_steps, self._messages, self._uploader = keep_every_steps, messages, uploader
        self._copies = HostCopies() if options.asynchronous else None
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._unsettled = False
        self._failures = 0
        self._saves = 0
        self._published_s = 0.0
        self._again: Callable[[], float] | None = None

    @property
    def longest_s(self) -> float:
        """Longest time from the start of a save until it was published, and uploaded, so far."""
        return self._published_s + (self._uploader.longest_s if self._uploader else 0.0)

    def save(self, engine: Any, content: Content) -> float:
        """Save the state of a DeepSpeed engine; returns the seconds that training waited.

        Raises:
            CheckpointError: checkpoint.max_failures saves in a row have failed.
        """
        # The thread before may still be writing from the very copies that this save is about to fill.
        self._settle()
        if self._failures > self._options.max_failures:
            raise CheckpointError(
                f"{self.root}: {self._failures} saves in a row failed (checkpoint.max_failures = "
                f"{self._options.max_failures}); the last one: {self._problem}. Checkpoints published before are "
                "untouched: when there is room, start the same command again"
            )
        started = time.monotonic()
        folder = folders.working_folder_of(self.root, content.step)
        if self.ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
        collected = collect(engine, folder, TAG, self._copies, content.rank_state)
        self._saves += 1
        self._again = lambda: self.save(engine, content)
        arguments = (self._saves, folder, content, collected, started)
        self._thread = threading.Thread(target=self._run, args=arguments, name="save", daemon=True)
        self._unsettled = True
        self._thread.start()
        if self._copies is None:
            self._thread.join()
        return time.monotonic() - started

    def finish(self) -> str:
        """Wait until the newest checkpoint is published, and uploaded; a failed save is tried again first.

        Returns:
            What could not be uploaded, and why; an empty string where nothing is missing.

        Raises:
            CheckpointError: the save still fails after checkpoint.max_failures attempts.
        """
        self._settle()
        while self._failures and self._again is not None:
            time.sleep(AGAIN_S)
            self._again()
            self._settle()
        if self._uploader is None:
            return ""
        return from_first(self.ranks, self._uploader.finish())

    def wait(self) -> None:
        """Wait until no save is going on; how it ended has been logged. Needs no other rank's help."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """End the threads. An upload that is going on is left: the next start takes it up again."""
        self.wait()
        self._messages.closed = True

    def _settle(self) -> None:
        """Wait for the save that is going on and agree with all ranks on how it ended."""
        if not self._unsettled:
            return
        self.wait()
        self._unsettled = False
        # On the main thread, where collectives are safe: ranks must count failures alike, or they part at a save.
        problems = sorted({problem for problem in gather_objects(self.ranks, self._problem) if problem})
        self._problem = "; ".join(problems)
        self._failures = self._failures + 1 if problems else 0

    def _run(self, number: int, folder: Path, content: Content, collected: Collected, started: float) -> None:
        """Run one save, in a thread. Whatever goes wrong ends in `_problem`, on all ranks."""
        key = f"save/{number}"
        try:
            self._messages.post(f"{key}/{self.ranks.rank}", self._write_part(folder, content, collected))
            if self.ranks.first:
                self._messages.post(key, self._judge(key, folder, content))
            self._problem = self._messages.wait(key, 2 * PARTS_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to
            self._problem = advice(error)
        if self._problem:
            if self.ranks.first:
                logger.error("step %d: NO CHECKPOINT, training goes on: %s", content.step, self._problem)
            return
        self._published_s = max(self._published_s, time.monotonic() - started)
        if self._uploader is not None:
            self._uploader.offer(content.step, content.keep)

    def _write_part(self, folder: Path, content: Content, collected: Collected) -> str:
        """Write this rank's files; return a JSON message for rank 0: sizes and hashes, or what went wrong."""
        try:
            same = digests(collected.rank_state)
            written = write_files(folder, content if self.ranks.first else None, collected, self.ranks.rank)
            return json.dumps({"entries": [asdict(describe_file(folder, path)) for path in written], "same": same})
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = _reason(folder) if isinstance(error, RuntimeError) else None
            return json.dumps({"problem": f"rank {self.ranks.rank}: {folder}: {advice(reason or error)}"})

    def _judge(self, key: str, folder: Path, content: Content) -> str:
        """Publish on rank 0 what all have written, or clear it away; return what is wrong, else an empty string."""
        parts = [
            parse_json(self._messages.take(f"{key}/{rank}", PARTS_TIMEOUT_S)) for rank in range(self.ranks.world_size)
        ]
        problems = [part["problem"] for part in parts if "problem" in part] or unequal([part["same"] for part in parts])
        if not problems:
            try:
                self._publish(folder, content, [FileEntry(**entry) for part in parts for entry in part["entries"]])
            except OSError as error:
                problems = [f"rank 0: {folder}: {advice(error)}"]
        if problems:
            shutil.rmtree(folder, ignore_errors=True)  # it holds the room that the next attempt needs
        return "; ".join(problems)

    def _publish(self, folder: Path, content: Content, entries: list[FileEntry]) -> None:
        # The manifest is the last file, and old checkpoints go after the rename: a kill at any line leaves a whole one.
        write_manifest(folder, Manifest(content.step, tuple(sorted(entries, key=lambda entry: entry.path))))
        published = folders.publish(self.root, content.step)
        # What is being uploaded must not go from under the threads that read it.
        keep = content.keep | (self._uploader.busy() if self._uploader else set())
        try:
            removed = folders.apply_retention(self.root, self._options.keep_last, self._keep_every_steps, keep)
        except OSError as error:
            removed = []
            logger.warning("%s: old checkpoints could not be removed: %s", self.root, advice(error))
        size = sum(entry.bytes for entry in entries)
        logger.info("checkpoint %s published, %.1f MB; removed %s", published, size / 1e6, removed or "none")


def write_files(folder: Path, content: Content | None, collected: Collected, rank: int) -> list[str]:
    """Write what was collected, and (rank 0) `content`; returns the paths of all files relative to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, state in collected.states:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    written = [str(path.relative_to(folder)) for path, _ in collected.states]
    collected.states.clear()
    written += write_rank_state(folder, collected.rank_state, rank)
    if content is None:
        return written
    for write in collected.afterwards:
        write()
    (folder / "latest").write_text(TAG, encoding="utf-8")
    (folder / STATE).write_text(json.dumps(content.state, indent=1), encoding="utf-8")
    (folder / RECIPE).write_text(content.recipe_text, encoding="utf-8")
    return written + sorted(path.name for path in folder.iterdir() if path.is_file())


def _reason(folder: Path) -> OSError | None:
    """Find the operating system's word on why torch could not write into `folder`, by trying."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").write_bytes(bytes(2**20))
    except OSError as error:
        return error
    return None


def open_saver(
    root: Path, ranks: Ranks, options: Checkpoint, keep_every_steps: int | None, keep: Set[int] = frozenset()
) -> Saver:
    """Open the saver of a run, with what uploads its checkpoints where the recipe says so; all ranks call it together.

    `keep` are the steps that must not be removed, until the first save says which.
    """
    # A space of its own for each run: several may follow one another in one set of processes.
    messages = RankMessages(from_first(ranks, secrets.token_hex(8)))
    remote, uploader = open_remote(options), None
    if remote is not None:
        uploader = Uploader(root, remote, ranks, messages, options.keep_last, keep_every_steps, keep)
    return Saver(root, ranks, options, keep_every_steps, messages, uploader)


def upload_rest(
    root: Path, ranks: Ranks, options: Checkpoint, keep_every_steps: int | None, keep: Set[int] = frozenset()
) -> None:
    """Upload what a finished run could not upload before.

    Raises:
        CheckpointError: it still can't be.
    """
    if not options.upload:
        return
    saver = open_saver(root, ranks, options, keep_every_steps, keep)
    missing = saver.finish()
    saver.close()
    if missing:
        raise CheckpointError(missing)
