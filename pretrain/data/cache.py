"""Whole shards on a local disk, shared by all ranks and workers of a node, never more than a byte limit.

Plain files and file locks, no shared memory: nothing is left behind that a crash could corrupt.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import filelock

from pretrain.data.index import Shard
from pretrain.errors import DataError
from pretrain.runtime import storage

PARTIAL = ".partial"


class ShardCache:
    """A folder of shards; the one that was used longest ago goes first.

    Args:
        folder: Local folder, made if missing.
        limit: Most bytes that the folder's shards may hold, those being fetched included.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.folder.mkdir(parents=True, exist_ok=True)

    def local_path(self, url: str, shard: Shard, deadline_s: float) -> str:
        """Path of the shard's local copy, fetched first if it is not there.

        Raises:
            DataError: one shard is larger than the limit.
            StorageError: the shard can't be fetched.
        """
        # The content's hash is part of the name: a repacked shard of the same name is another file.
        name = hashlib.sha256(f"{url} {shard.sha256}".encode()).hexdigest()[:32] + ".tar"
        target = self.folder / name
        if self._touched(target):
            return str(target)
        if shard.bytes > self.limit:
            raise DataError(f"{shard.name} has {shard.bytes} bytes, data.cache_gb allows {self.limit}; raise it")
        with self._lock(name, deadline_s):
            if not self._touched(target):
                partial = self.folder / (name + PARTIAL)
                self._reserve(partial, shard.bytes, deadline_s)
                storage.download(url, str(partial), shard.bytes, deadline_s)
                partial.rename(target)
        return str(target)

    def bytes_used(self) -> int:
        """Bytes of all shards in the folder, those being fetched included."""
        return sum(size for _, size, _ in self._files())

    def _reserve(self, partial: Path, size: int, deadline_s: float) -> None:
        """Make room, and take it at once with a file of the final size, so that several workers can't overdraw."""
        with self._lock("folder", deadline_s):
            with suppress(FileNotFoundError):
                partial.unlink()
            used = self.bytes_used()
            for _, old_size, path in sorted(self._files()):
                if used + size <= self.limit:
                    break
                if self._removed(path):
                    used -= old_size
            with open(partial, "wb") as file:
                file.truncate(size)

    def _removed(self, path: Path) -> bool:
        if path.suffix != PARTIAL:
            # A reader that has it open keeps reading; one that is about to open it fetches again.
            with suppress(FileNotFoundError):
                path.unlink()
            return True
        try:
            # Unlocked, it belongs to a process that was killed.
            with self._lock(path.name.removesuffix(PARTIAL), 0):
                path.unlink(missing_ok=True)
            return True
        except filelock.Timeout:
            return False

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", ".tar" + PARTIAL)):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    yield status.st_mtime, status.st_size, Path(entry.path)

    def _touched(self, path: Path) -> bool:
        try:
            os.utime(path)
            return True
        except FileNotFoundError:
            return False

    def _lock(self, name: str, timeout_s: float) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / f"{name}.lock", timeout=timeout_s)
