"""Whole shards on a local disk, shared by all ranks and workers of a node, never more than a byte limit.

Plain files and file locks, no shared memory: nothing is left behind that a crash could corrupt.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import filelock
import tenacity

from pretrain.data.index import Shard
from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.lease import has_flock
from pretrain.runtime.untrusted import name_bytes

PARTIAL = ".partial"


class ShardCache:
    """A folder of shards; the one that was used longest ago goes first.

    Args:
        folder: Local folder, made if missing.
        limit: Most bytes that the folder's shards may hold, those being fetched included.

    Raises:
        DataError: the folder's file system has no locks.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        if not has_flock(self.folder):
            raise DataError(
                f"data.cache_dir: {self.folder} lies on a file system without flock, and the ranks of a host share it "
                "by that; give a folder on a local disk"
            )

    def local_path(self, url: str, shard: Shard, deadline_s: float) -> str:
        """Return the path of the shard's local copy, fetched first if it is not there.

        Raises:
            DataError: one shard is larger than the limit.
            StorageError: the shard can't be fetched.
        """
        name = _name(url, shard)
        target = self.folder / name
        if self._touched(target):
            return str(target)
        if shard.bytes > self.limit:
            raise DataError(f"{shard.name} has {shard.bytes} bytes, data.cache_gb allows {self.limit}; raise it")
        with self._lock(name, deadline_s):
            if not self._touched(target):
                partial = self.folder / f"{name}.{shard.bytes}{PARTIAL}"
                self._reserve(partial, shard.bytes, deadline_s)
                storage.download(url, str(partial), shard.bytes, deadline_s)
                # Under the folder's lock: a scan that a rename overtakes may see neither name, and overdraw.
                with self._lock("folder", deadline_s):
                    partial.rename(target)
        return str(target)

    def read(self, url: str, shard: Shard, begin: int, end: int, deadline_s: float) -> bytes:
        """Read the range [begin, end) of a shard, which is fetched first if it is not there."""
        retrying = tenacity.Retrying(
            # Another worker may evict the shard between finding and opening it.
            retry=tenacity.retry_if_exception_type(FileNotFoundError),
            stop=tenacity.stop_after_attempt(5),
            reraise=True,
        )
        try:
            return retrying(self._read, url, shard, begin, end, deadline_s)
        except OSError as error:
            raise StorageError(f"{self.folder}: {shard.name} can't be read from the cache: {error}") from error

    def _read(self, url: str, shard: Shard, begin: int, end: int, deadline_s: float) -> bytes:
        with open(self.local_path(url, shard, deadline_s), "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def forget(self, url: str, shard: Shard) -> None:
        """Remove the local copy of a shard, which is damaged; the next read fetches another."""
        (self.folder / _name(url, shard)).unlink(missing_ok=True)

    def bytes_used(self) -> int:
        """Count the bytes of all shards in the folder, those being fetched included."""
        return sum(size for _, size, _ in self._files())

    def _reserve(self, partial: Path, size: int, deadline_s: float) -> None:
        """Make room, and take it at once with a file that has the size in its name, so that nobody overdraws.

        Shards that others are fetching can't go; where they fill the cache, this waits until one is complete.
        """
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(deadline_s),
            wait=tenacity.wait_fixed(0.05),
            retry=tenacity.retry_if_result(lambda reserved: not reserved),
        )
        try:
            retrying(self._reserved, partial, size, deadline_s)
        except tenacity.RetryError as error:
            raise StorageError(
                f"{self.folder}: no room for {size} bytes in {deadline_s:.0f} s, other shards are being fetched into "
                f"all of the {self.limit} bytes; raise data.cache_gb"
            ) from error

    def _reserved(self, partial: Path, size: int, deadline_s: float) -> bool:
        with self._lock("folder", deadline_s):
            partial.unlink(missing_ok=True)
            used = self.bytes_used()
            for _, old_size, path in sorted(self._files()):
                if used + size <= self.limit:
                    break
                if self._removed(path):
                    used -= old_size
            if used + size > self.limit:
                return False
            partial.touch()
            return True

    def _removed(self, path: Path) -> bool:
        """Remove a file if it is not being fetched; tell whether that made room."""
        try:
            if path.suffix != PARTIAL:
                # A reader that has it open keeps reading; one that is about to open it (`read`) fetches it again.
                path.unlink()
            else:
                # Unlocked, it belongs to a process that was killed.
                with self._lock(path.name.split(".")[0] + ".tar", 0):
                    path.unlink()
        except (FileNotFoundError, filelock.Timeout):
            return False
        return True

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """List time of last use, bytes taken and path of every shard; one being fetched takes its final size."""
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", PARTIAL)):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    size = int(entry.name.split(".")[-2]) if entry.name.endswith(PARTIAL) else status.st_size
                    yield status.st_mtime, size, Path(entry.path)

    def _touched(self, path: Path) -> bool:
        try:
            os.utime(path)
            return True
        except FileNotFoundError:
            return False

    def _lock(self, name: str, timeout_s: float) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / f"{name}.lock", timeout=timeout_s)


def _name(url: str, shard: Shard) -> str:
    # The content's hash is part of the name: a repacked shard of the same name is another file.
    return hashlib.sha256(name_bytes(f"{url} {shard.sha256}")).hexdigest()[:32] + ".tar"
