"""Originals inside zip archives, named as Swin Transformer's zip mode names them: `train.zip@/n01440764/1.JPEG`.

An archive's directory is read once in every process that reads from it, and kept: 0.6 kB for each entry, so 0.8 GB for
the training images of ImageNet.
"""

import functools
import posixpath
import threading
import zipfile
import zlib

import fsspec

from pretrain.errors import RecipeError, SampleError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.retries import retried

#: Between an archive's path and that of an entry in it.
BETWEEN = "@/"
ENDING = ".zip"
#: Longest time of reading one entry, retries included, seconds.
DEADLINE_S = 300.0

_LOCK = threading.Lock()


def is_entry(path: str) -> bool:
    """Tell whether a path names an entry of an archive."""
    return ENDING + BETWEEN in path


def entry_path(archive: str, name: str) -> str:
    """Join the path of an entry."""
    return f"{archive}{BETWEEN}{name.lstrip('/')}"


def find(archive: str) -> dict[str, int]:
    """List every file in an archive: name -> bytes when unpacked; sorted.

    Raises:
        RecipeError: it is no zip archive.
    """
    try:
        entries = _open(archive).infolist()
    except zipfile.BadZipFile as error:
        raise RecipeError(f"{archive}: no whole zip archive ({error}); copy it again") from error
    return dict(sorted((entry.filename, entry.file_size) for entry in entries if not entry.is_dir()))


def map_of(archive: str) -> str | None:
    """Find the list beside an archive that says what to take of it, `train_map.txt` for `train.zip`; None without."""
    where = f"{archive[: -len(ENDING)]}_map.txt"
    return where if storage.exists(where) else None


def size(path: str) -> int:
    """Tell the bytes of an entry, unpacked; StorageError where it is not there."""
    archive, name = _split(path)
    try:
        return _open(archive).getinfo(name).file_size
    except KeyError as error:
        raise StorageError(f"{path}: the archive has no such entry") from error


def read(path: str) -> bytes:
    """Unpack one entry; its checksum is compared.

    Raises:
        SampleError: "missing" for no such entry or archive, "unreadable" for a damaged or encrypted one.
        StorageError: the store does not answer.
    """
    archive, name = _split(path)
    try:
        return retried(lambda: _open(archive).read(name), archive, "reading", DEADLINE_S)
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, KeyError):
            raise SampleError("missing", f"{archive} has no entry {name}") from error
        if isinstance(cause, (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)):
            raise SampleError("unreadable", f"entry of a zip archive: {cause}") from error
        raise


def _split(path: str) -> tuple[str, str]:
    archive, _, name = path.partition(ENDING + BETWEEN)
    return archive + ENDING, posixpath.normpath(name)


def _open(archive: str) -> zipfile.ZipFile:
    with _LOCK:  # threads that list sizes would all read the directory
        return _opened(archive)


# Few: a directory takes 0.6 kB an entry, and every packing process keeps its own.
@functools.lru_cache(maxsize=4)
def _opened(archive: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(fsspec.open(archive, "rb").open())
