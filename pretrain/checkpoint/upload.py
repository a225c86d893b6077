"""Copying published checkpoints to an object store, in a thread of each rank, while training goes on.

Rank 0 decides what is uploaded next, every rank uploads its share of the files, and rank 0 adds the manifest when all
have done so. What could not be uploaded stays on the local disk under the same rule of retention, is told at WARNING
and in uploads.json, and is tried again when the next checkpoint is published, or at the next start.
"""

import json
import logging
import threading
import time
from collections.abc import Set
from pathlib import Path
from typing import Any

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import read_manifest, write_durably
from pretrain.checkpoint.rank_messages import RankMessages
from pretrain.checkpoint.remote import RemoteCheckpoints
from pretrain.errors import TubeletError
from pretrain.runtime.disk import Tolerance, advice
from pretrain.runtime.process_group import Ranks

logger = logging.getLogger(__name__)

#: What is told of uploads, in the run folder.
REPORT = "uploads.json"

#: What rank 0 posts instead of a step when nothing follows.
END = "end"


class Uploader:
    """Thread that keeps `remote` up to date with the published checkpoints below `root`.

    Args:
        root: The run's folder of checkpoints, visible to all ranks.
        remote: Where they go.
        ranks: This process among all.
        messages: Messages between ranks.
        keep_last: Newest checkpoints that stay at `remote`.
        keep_every_steps: One of every so many steps stays there for good; None: none.
        keep: Further steps that stay there.
    """

    def __init__(
        self,
        root: Path,
        remote: RemoteCheckpoints,
        ranks: Ranks,
        messages: RankMessages,
        keep_last: int,
        keep_every_steps: int | None,
        keep: Set[int] = frozenset(),
    ) -> None:
        self._root, self._remote, self._ranks, self._messages = root, remote, ranks, messages
        self._keep_last, self._keep_every_steps = keep_last, keep_every_steps
        self._changed = threading.Condition()
        self._uploaded: set[int] = set()
        self._failed: dict[int, str] = {}
        self._current: int | None = None
        self._ending = False
        self._number = 0
        self._keep = keep
        self._tolerate = Tolerance()
        self.longest_s = 0.0
        self._thread = threading.Thread(target=self._lead if ranks.first else self._follow, name="upload", daemon=True)
        self._thread.start()

    def offer(self, step: int, keep: Set[int] = frozenset()) -> None:
        """Offer a published checkpoint (rank 0 acts on it): upload it, then what failed before; `keep` stay as well."""
        with self._changed:
            self._keep = keep
            # A rewind publishes a step anew: the store has its files of before.
            self._uploaded.discard(step)
            self._failed.clear()
            self._changed.notify()

    def busy(self) -> set[int]:
        """Return the step that is being uploaded: its local files must stay."""
        current = self._current
        return set() if current is None else {current}

    def finish(self) -> str:
        """Wait until all that is to be uploaded is there, or has failed once more.

        Returns:
            On rank 0 what could not be uploaded and why; else, and on other ranks, an empty string.
        """
        with self._changed:
            self._failed.clear()
            self._ending = True
            self._changed.notify()
        self._thread.join()
        missing = self._waiting() if self._ranks.first else set()
        if not missing:
            return ""
        step = max(missing)
        reason = self._failed.get(step, "the upload thread ended (see the log)")
        return (
            f"{folders.folder_of(self._root, step)} could not be uploaded to {self._remote}: {reason}. It is whole on "
            "the local disk: start the same command again when the store answers, and it is uploaded"
        )

    def _lead(self) -> None:
        """Run rank 0's thread: choose, upload, tell, until `finish`."""
        self._look_at_remote()
        while (step := self._next()) is not None:
            started = time.monotonic()
            try:
                problem = self._upload_with_all(step)
            # Of any kind: a thread that ends here would leave all later checkpoints on the local disk, without a word.
            except Exception as error:  # a thread has nobody to raise to; the checkpoint stays in the queue
                problem = str(error)
            seconds = time.monotonic() - started
            with self._changed:
                self._current = None
                if problem:
                    self._failed[step] = problem
                else:
                    self._uploaded.add(step)
                    self.longest_s = max(self.longest_s, seconds)
            self._tell(step, problem, seconds)
        self._messages.post(f"upload/{self._number + 1}", END)

    def _look_at_remote(self) -> None:
        try:
            with self._changed:
                self._uploaded = set(self._remote.steps())
        except TubeletError as error:
            logger.warning("%s can't be listed, all local checkpoints will be uploaded: %s", self._remote, error)

    def _next(self) -> int | None:
        """Wait for a step to upload and return the newest; None: nothing waits and `finish` was called."""
        with self._changed:
            while True:
                waiting = self._waiting() - self._failed.keys()
                if waiting:
                    # Newest first: a lost disk would need it, and retention may take older ones meanwhile.
                    self._current = max(waiting)
                    return self._current
                if self._ending or self._messages.closed:
                    return None
                # With a time limit, since nobody notifies when the messages are closed.
                self._changed.wait(timeout=1.0)

    def _waiting(self) -> set[int]:
        """List steps that are on the disk, are to be kept, and are not in the store."""
        try:
            steps = [folders.step_of(folder) for folder in folders.published(self._root)]
        except OSError as error:
            logger.warning("%s can't be listed: %s", self._root, advice(error))
            return set()
        wanted = folders.retained(steps, self._keep_last, self._keep_every_steps) | self._keep & set(steps)
        return wanted - self._uploaded

    def _upload_with_all(self, step: int) -> str:
        """Do rank 0's side of one upload; return what went wrong on any rank, else an empty string."""
        manifest = read_manifest(folders.folder_of(self._root, step))
        # First: under the old manifest a mixture of old and new files would pass for a checkpoint.
        self._remote.unpublish(step)
        self._number += 1
        key = f"upload/{self._number}"
        self._messages.post(key, str(step))
        self._messages.post(f"{key}/0", self._upload_share(step))
        timeout = 2 * self._remote.deadline_s
        answers = {self._messages.take(f"{key}/{rank}", timeout) for rank in range(self._ranks.world_size)} - {""}
        if answers:
            return "; ".join(sorted(answers))
        self._remote.publish(manifest)
        try:
            self._remote.retire(self._keep_last, self._keep_every_steps, {step} | self._keep)
        except TubeletError as error:
            logger.warning("%s: old checkpoints could not be removed: %s", self._remote, error)
        return ""

    def _upload_share(self, step: int) -> str:
        """Upload this rank's files; return what went wrong, else an empty string."""
        folder = folders.folder_of(self._root, step)
        try:
            # Large files in turn, so that shares are of like size.
            files = sorted(read_manifest(folder).files, key=lambda entry: (-entry.bytes, entry.path))
            self._remote.upload(folder, step, files[self._ranks.rank :: self._ranks.world_size])
            # Before the manifest: whoever restores this checkpoint finds metrics that reach as far.
            self._remote.upload_records(self._root.parent, self._ranks.rank, self._ranks.world_size)
        except Exception as error:
            return f"rank {self._ranks.rank}: {error}"
        return ""

    def _follow(self) -> None:
        """Run the thread of the other ranks: do as rank 0 says."""
        number = 1
        try:
            while (word := self._messages.wait(f"upload/{number}")) != END:
                self._messages.post(f"upload/{number}/{self._ranks.rank}", self._upload_share(int(word)))
                number += 1
        except Exception as error:
            if not self._messages.closed:
                logger.warning("uploads end, rank 0 does not answer: %s", error)

    def _tell(self, step: int, problem: str, seconds: float) -> None:
        """Log an upload and write uploads.json."""
        if problem:
            logger.warning(
                "checkpoint of step %d NOT UPLOADED to %s (kept on the local disk, tried again when the next one is "
                "due): %s",
                *(step, self._remote, problem),
            )
        else:
            logger.info("checkpoint of step %d uploaded to %s in %.1f s", step, self._remote, seconds)
        report: dict[str, Any] = {
            "url": str(self._remote),
            "uploaded": sorted(self._uploaded),
            "failed": {str(failed): reason for failed, reason in self._failed.items()},
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with self._tolerate(REPORT):
            write_durably(self._root.parent / REPORT, json.dumps(report, indent=1) + "\n")
