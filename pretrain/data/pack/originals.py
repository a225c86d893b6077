"""Reading what is to be packed: files on disks, object stores and inside zip archives."""

import os
import tempfile

from pretrain.data.pack import zip_source
from pretrain.errors import DataError, SampleError, StorageError
from pretrain.runtime import storage


def fetch(path: str) -> bytes:
    """Read all bytes of an original.

    Raises:
        SampleError: "missing", "storage" where access is denied, "unreadable" for a damaged entry of a zip archive.
        DataError: the store does not answer.
    """
    try:
        if zip_source.is_entry(path):
            return zip_source.read(path)
        check_local(path)
        return storage.read_bytes(path)
    except StorageError as error:
        raise refusal(error) from error


def fetch_whole(path: str) -> bytes:
    """Read as `fetch` does; SampleError "empty" for a file of 0 bytes."""
    data = fetch(path)
    if not data:
        raise SampleError("empty", "the file has 0 bytes")
    return data


def check_local(path: str) -> None:
    """Raise SampleError("missing") for a local path without a file; URLs are asked for when they are read."""
    if "://" in path or os.path.isfile(path):
        return
    if os.path.lexists(path):
        target = f"a link to {os.readlink(path)}, where no file is" if os.path.islink(path) else "no regular file"
        raise SampleError("missing", target)
    raise SampleError("missing", "no such file; relative paths in lists start at --data-root")


def size(path: str) -> int:
    """Look up the bytes of an original; errors as by `fetch`."""
    try:
        return zip_source.size(path) if zip_source.is_entry(path) else storage.size(path)
    except StorageError as error:
        raise refusal(error) from error


def folder_size(path: str) -> int:
    """Add up the bytes of all files of a folder, 0 for one that is not there; errors as by `fetch`."""
    try:
        return sum(storage.find(path).values())
    except StorageError as error:
        raise refusal(error) from error


def keep(data: bytes, ending: str, folder: str) -> str:
    """Write a member's content to a new file in the local `folder`; return its path."""
    # Not deleted here: a worker writes it, and the packing process adds it to the shard.
    with tempfile.NamedTemporaryFile(dir=folder, suffix="." + ending, delete=False) as file:
        file.write(data)
    return file.name


def refusal(error: StorageError) -> SampleError | DataError:
    """Tell what follows for the item: it is missing or denied; or, where the store does not answer, nothing, and the
    packing stops: the next item would fare no better."""
    if isinstance(error.__cause__, FileNotFoundError):
        return SampleError("missing", str(error))
    if isinstance(error.__cause__, PermissionError):
        return SampleError("storage", str(error))
    return DataError(f"{error}; when the store answers again, start the same command: packing goes on where it was")
