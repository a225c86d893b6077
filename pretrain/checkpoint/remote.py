"""Checkpoints on an object store: the same files below `<url>/checkpoints/step_…`, the manifest uploaded last.

A store has no rename. A checkpoint there exists from the moment its manifest does, and stops existing when its manifest
is removed, which is done first; so no reader ever takes a part for the whole.
"""

import logging
import re
import time
from collections.abc import Sequence, Set
from pathlib import Path

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import MANIFEST, FileEntry, Manifest, describe_file, parse_manifest
from pretrain.errors import CheckpointError, StorageError
from pretrain.runtime import storage

logger = logging.getLogger(__name__)

#: What a manifest is called whose checkpoint lies after the one that a run was taken back to.
SUPERSEDED = "superseded_manifest.json"

#: Files of the run folder that travel with its checkpoints: all that a resume reads, and the run's history.
RECORDS = (
    "recipe.yaml", "environment.json", "metrics.jsonl", "guard.json", "hangs.jsonl", "best.json", "timings.json",
    "wandb_id",
)  # fmt: skip

#: Folder of the run folder with a file of each rank, which travel as well.
RECORDS_BY_RANK = "bad_samples"

RANK_FILE = re.compile(r"rank_\d{5,}\.jsonl")

#: Longest time of a small request, seconds.
REQUEST_S = 120.0


class RemoteCheckpoints:
    """The checkpoints of one run below a URL.

    Args:
        url: The run's folder on the store, any fsspec URL.
        deadline_s: Longest time that a transfer of several files may take, retries included.
    """

    def __init__(self, url: str, deadline_s: float) -> None:
        self.url, self.deadline_s = url.rstrip("/"), deadline_s
        self._request_s = min(REQUEST_S, deadline_s)

    def __str__(self) -> str:
        return self.url

    def of(self, step: int) -> str:
        """Return the URL of the checkpoint of `step`."""
        return storage.join(self.url, "checkpoints", folders.folder_of(Path(), step).name)

    def steps(self) -> list[int]:
        """List steps whose checkpoints are complete, ascending."""
        found = storage.find(storage.join(self.url, "checkpoints"), self._request_s)
        # By the manifest, not by the folder: without one it is an upload, or a removal, that was cut short.
        manifests = [Path(path).parent for path in found if Path(path).name == MANIFEST]
        return sorted(folders.step_of(folder) for folder in manifests if folders.is_name(folder.name))

    def manifest(self, step: int) -> Manifest:
        """Read a checkpoint's manifest. Raises CheckpointError: damaged; StorageError: not there."""
        url = storage.join(self.of(step), MANIFEST)
        return parse_manifest(storage.read_bytes(url, deadline_s=self._request_s), url)

    def upload(self, folder: Path, step: int, entries: Sequence[FileEntry]) -> None:
        """Copy some files of a checkpoint; its manifest comes separately."""
        end = time.monotonic() + self.deadline_s
        for entry in entries:
            left = max(end - time.monotonic(), 1.0)
            storage.upload(str(folder / entry.path), storage.join(self.of(step), entry.path), left)

    def upload_records(self, run_dir: Path, rank: int, world_size: int) -> None:
        """Copy this rank's share of the run folder's records to where the run's folder of checkpoints is."""
        # Also of ranks that this start does not have: a resume reads and shortens the files of all.
        by_rank = sorted((run_dir / RECORDS_BY_RANK).glob("rank_*.jsonl"))[rank::world_size]
        for path in [*by_rank, *(run_dir / name for name in RECORDS if rank == 0)]:
            if path.is_file():
                place = storage.join(self.url, str(path.relative_to(run_dir)))
                storage.upload(str(path), place, self.deadline_s)

    def records(self) -> list[str]:
        """List the records that are there, relative to the run folder."""
        by_rank = storage.find(storage.join(self.url, RECORDS_BY_RANK), self._request_s)
        found = [f"{RECORDS_BY_RANK}/{name}" for name in by_rank if RANK_FILE.fullmatch(name)]
        return found + [name for name in RECORDS if storage.exists(storage.join(self.url, name), self._request_s)]

    def publish(self, manifest: Manifest) -> None:
        """Compare the sizes of what arrived and add the manifest.

        Raises:
            CheckpointError: something is missing or cut.
        """
        found = storage.find(self.of(manifest.step), self._request_s)
        wrong = [
            f"{entry.path}: {found.get(entry.path)} bytes instead of {entry.bytes}"
            for entry in manifest.files
            if found.get(entry.path) != entry.bytes
        ]
        if wrong:
            raise CheckpointError(f"{self.of(manifest.step)}: not what was uploaded: {'; '.join(wrong)}")
        storage.write_bytes(
            storage.join(self.of(manifest.step), MANIFEST), manifest.to_json().encode(), self._request_s
        )

    def unpublish(self, step: int) -> None:
        """Remove the manifest, so that the files may be replaced or removed."""
        storage.remove(storage.join(self.of(step), MANIFEST), self._request_s)

    def remove(self, step: int) -> None:
        """Remove a checkpoint."""
        self.unpublish(step)
        storage.remove(self.of(step), self.deadline_s)

    def retire(self, keep_last: int, keep_every_steps: int | None, keep: Set[int]) -> list[int]:
        """Remove what the rule of retention does not keep; returns the steps."""
        steps = self.steps()
        kept = folders.retained(steps, keep_last, keep_every_steps) | keep
        gone = [step for step in steps if step not in kept and not self._marked(step)]
        for step in gone:
            self.remove(step)
        return gone

    def _marked(self, step: int) -> bool:
        return storage.exists(storage.join(self.of(step), folders.KEEP_FILE), self._request_s)

    def supersede_after(self, step: int) -> None:
        """Hide the checkpoints after `step` from the next start; their files stay until they are overwritten."""
        for later in [found for found in self.steps() if found > step]:
            storage.move(
                storage.join(self.of(later), MANIFEST), storage.join(self.of(later), SUPERSEDED), self._request_s
            )
            logger.warning("%s superseded: the run goes on from step %d", self.of(later), step)

    def fetch(self, manifest: Manifest, folder: Path, part: int = 0, parts: int = 1) -> None:
        """Download every `parts`-th file from `part` on into `folder`, but not what is there and right already.

        Raises:
            StorageError: a file could not be read, or is not what the manifest says.
        """
        end = time.monotonic() + self.deadline_s
        for entry in manifest.files[part::parts]:
            target, url = folder / entry.path, storage.join(self.of(manifest.step), entry.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_file() and describe_file(folder, entry.path) == entry:
                continue
            storage.download(url, str(target), entry.bytes, max(end - time.monotonic(), 1.0))
            # A right size tells nothing of bytes that were damaged in the store.
            if describe_file(folder, entry.path) != entry:
                raise StorageError(f"{url}: content differs from its sha256")
