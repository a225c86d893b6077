"""Originals inside zip archives, named as Swin Transformer's zip mode names them: `train.zip@/n01440764/1.JPEG`.

An archive's directory is read once in every process that reads from it, and kept: 0.6 kB for each entry, so 0.8 GB for
the training images of ImageNet.
"""

import functools
import lzma
import posixpath
import threading
import zipfile
import zlib
from collections.abc import Callable
from typing import TypeVar

import fsspec

from pretrain.errors import RecipeError, SampleError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.retries import retried

T = TypeVar("T")

#: Between an archive's path and that of an entry in it.
BETWEEN = "@/"
ENDING = ".zip"
#: Longest time of reading one entry, retries included, seconds.
DEADLINE_S = 300.0

_LOCK = threading.Lock()


def is_archive(path: str) -> bool:
    """Tell whether a path names an archive, by its ending."""
    return path.lower().endswith(ENDING)


def is_entry(path: str) -> bool:
    """Tell whether a path names an entry of an archive."""
    return ENDING + BETWEEN in path.lower()


def entry_path(archive: str, name: str) -> str:
    """Build the path of an entry."""
    return f"{archive}{BETWEEN}{name.lstrip('/')}"


def find(archive: str) -> dict[str, int]:
    """List every file in an archive: name -> bytes when unpacked; sorted.

    Raises:
        RecipeError: it is no zip archive.
        StorageError: the store does not answer, or denies access.
    """
    try:
        entries = retried(lambda: _open(archive).infolist(), archive, "reading", DEADLINE_S)
    except StorageError as error:
        if isinstance(error.__cause__, zipfile.BadZipFile):
            raise RecipeError(f"{archive}: no whole zip archive ({error.__cause__}); copy it again") from error
        raise
    return dict(sorted((entry.filename, entry.file_size) for entry in entries if not entry.is_dir()))


def map_of(archive: str) -> str | None:
    """Find the list beside an archive that says what to take of it, `train_map.txt` for `train.zip`; None without."""
    where = f"{archive[: -len(ENDING)]}_map.txt"
    return where if storage.exists(where) else None


def size(path: str) -> int:
    """Look up the bytes of an entry, unpacked; errors as by `read`."""
    return _from_entry(path, lambda archive, name: archive.getinfo(name).file_size)


def read(path: str) -> bytes:
    """Unpack one entry; its checksum is compared.

    Raises:
        SampleError: "missing" for no such entry or archive, "unreadable" for a damaged or encrypted one.
        StorageError: the store does not answer.
    """
    return _from_entry(path, lambda archive, name: archive.read(name))


def _from_entry(path: str, call: Callable[[zipfile.ZipFile, str], T]) -> T:
    archive, name = _split(path)
    try:
        return retried(lambda: call(_open(archive), name), archive, "reading", DEADLINE_S)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, KeyError):
            raise SampleError("missing", f"{archive} has no entry {name}") from error
        if isinstance(
            cause, (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError)
        ):
            raise SampleError("unreadable", f"entry of a zip archive: {cause}") from error
        raise


def _split(path: str) -> tuple[str, str]:
    place = path.lower().index(ENDING + BETWEEN) + len(ENDING)
    return path[:place], posixpath.normpath(path[place + len(BETWEEN) :])


def _open(archive: str) -> zipfile.ZipFile:
    with _LOCK:  # threads that list sizes would all read the directory
        return _opened(archive)


@functools.lru_cache(maxsize=4)
def _opened(archive: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(fsspec.open(archive, "rb").open())
