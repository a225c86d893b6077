"""Reads and writes on any fsspec URL, with retries under one deadline (retries.py)."""

import logging
import os
import posixpath
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec

from pretrain.errors import StorageError
from pretrain.runtime.retries import retried
from pretrain.runtime.signed_reads import SIGNED

logger = logging.getLogger(__name__)


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or local path."""
    return posixpath.join(url, *parts)


def parent(url: str) -> str:
    """Return the folder of a URL or local path."""
    return posixpath.dirname(url.rstrip("/"))


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of `url` and the path inside it; names the extra when its client is missing."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}.get(url.split("://")[0])
        hint = f"pip install 'tubelet[{extra}]'" if extra else str(error)
        raise StorageError(f"{url}: no client for this kind of storage is installed; {hint}") from error
    except ValueError as error:
        raise StorageError(f"{url}: {error}") from error


def is_local(url: str) -> bool:
    """Tell whether `url` is on a mounted file system, where files are renamed and locked."""
    return fsspec.utils.get_protocol(url) in ("file", "local")


def read_bytes(
    url: str, start: int | None = None, end: int | None = None, deadline_s: float = 300.0, denied_for_good: bool = True
) -> bytes:
    """Read `url`, or its range [start, end), as bytes.

    Args:
        url: Where.
        start: First byte.
        end: Byte after the last.
        deadline_s: Longest time of all attempts together, seconds.
        denied_for_good: Whether a denied access is an error at once. Where the same credentials have worked before, it
            may pass: keys are rotated, and a new one takes a while to be known everywhere.

    Raises:
        StorageError: still failing when `deadline_s` has passed, or failing for good.
    """

    if start is not None and end is not None:
        return _read_range(url, start, end, deadline_s, denied_for_good)

    def read() -> bytes:
        fs, path = filesystem(url)
        data: bytes = fs.cat_file(path, start=start, end=end)
        return data

    return retried(read, url, "reading", deadline_s, denied_for_good=denied_for_good)


def _read_range(url: str, start: int, end: int, deadline_s: float, denied_for_good: bool) -> bytes:
    begin = time.monotonic()
    fs, path = filesystem(url)
    signed = SIGNED.read(fs, path, start, end, deadline_s)
    if signed is not None:
        return signed

    def read() -> bytes:
        data: bytes = fs.cat_file(path, start=start, end=end)
        if len(data) == end - start:
            SIGNED.client_has_read(fs, path)
            return data
        # An answer cut by the network is worth another try; of a file that is too short, waiting cures nothing.
        if int(fs.size(path)) >= end:
            raise ConnectionError(f"the answer ended after {len(data)} of {end - start} bytes")
        raise StorageError(
            f"{url}: {len(data)} bytes from {start} on instead of {end - start}: shorter than its index says"
        )

    left = deadline_s - (time.monotonic() - begin)
    return retried(read, url, "reading", left, denied_for_good=denied_for_good)


def write_bytes(url: str, data: bytes, deadline_s: float = 300.0) -> None:
    """Write `data` to `url`, whole or not at all (local files are renamed into place)."""

    def write() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            fs.makedirs(parent(path), exist_ok=True)
            fs.pipe_file(path + ".partial", data)
            Path(path + ".partial").replace(path)
        else:
            fs.pipe_file(path, data)

    retried(write, url, "writing", deadline_s)


def exists(url: str, deadline_s: float = 60.0) -> bool:
    """Tell whether a file or folder is at `url`; asks anew, since another machine may have written it meanwhile."""

    def look() -> bool:
        fs, path = filesystem(url)
        fs.invalidate_cache()
        return bool(fs.exists(path))

    return retried(look, url, "looking for", deadline_s)


def is_folder(url: str, deadline_s: float = 60.0) -> bool:
    """Tell whether a folder is at `url`; on an object store, whether files lie below it."""

    def look() -> bool:
        fs, path = filesystem(url)
        return bool(fs.isdir(path))

    return retried(look, url, "looking for", deadline_s)


def size(url: str, deadline_s: float = 60.0, denied_for_good: bool = True) -> int:
    """Return the size of a file in bytes; see `read_bytes` for the arguments."""

    def look() -> int:
        fs, path = filesystem(url)
        return int(fs.size(path))

    return retried(look, url, "looking for", deadline_s, denied_for_good=denied_for_good)


def list_names(url: str, deadline_s: float = 60.0) -> list[str]:
    """List names (without folder) of what lies directly in the folder `url`, sorted; a missing folder is empty."""

    def look() -> list[str]:
        fs, path = filesystem(url)
        # Listings are cached by object-store clients; what another process wrote must be seen.
        fs.invalidate_cache()
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        own = path.rstrip("/")
        return sorted(posixpath.basename(name.rstrip("/")) for name in found if name.rstrip("/") != own)

    return retried(look, url, "listing", deadline_s)


def find(url: str, deadline_s: float = 600.0) -> dict[str, int]:
    """List all files below the folder `url`, at any depth: relative path -> bytes; sorted; empty without a folder."""

    def look() -> dict[str, int]:
        fs, path = filesystem(url)
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        found = fs.find(path, detail=True)
        return {name.removeprefix(root): int(found[name]["size"]) for name in sorted(found) if name != path}

    return retried(look, url, "listing", deadline_s)


def find_linked(url: str, deadline_s: float = 600.0) -> dict[str, int]:
    """List all files below a folder as `find` does, those in folders that are linked there too; links to nothing have 0
    bytes.

    People put data sets together of links, and fsspec passes linked folders over without a word.
    """
    if not is_local(url):
        return find(url, deadline_s)
    root = filesystem(url)[1]
    found: dict[str, int] = {}
    for folder, inner, names in os.walk(root, followlinks=True):
        # A link to a folder that it lies in would be followed for ever.
        above = {os.path.realpath(folder)} | {os.path.realpath(place) for place in _above(folder, root)}
        looped = [name for name in inner if os.path.realpath(os.path.join(folder, name)) in above]
        for name in looped:
            logger.warning("%s leads back to a folder that it lies in; not followed", os.path.join(folder, name))
        inner[:] = [name for name in inner if name not in looped]
        for name in names:
            path = os.path.join(folder, name)
            try:
                size = os.stat(path).st_size
            except OSError:  # a link to nothing: whoever wants that file is to say so
                size = 0
            found[os.path.relpath(path, root)] = size
    return dict(sorted(found.items()))


def _above(folder: str, root: str) -> list[str]:
    """Return the folders between one and the root, the root too."""
    places = []
    while folder != root and len(folder) > len(root):
        folder = os.path.dirname(folder)
        places.append(folder)
    return places


def glob(pattern: str, deadline_s: float = 60.0) -> list[str]:
    """List URLs that match a shell pattern, sorted."""

    def look() -> list[str]:
        fs, path = filesystem(pattern)
        return sorted(name if is_local(pattern) else fs.unstrip_protocol(name) for name in fs.glob(path))

    return retried(look, pattern, "listing", deadline_s)


def make_folder(url: str, deadline_s: float = 60.0) -> None:
    """Make a folder and those above it, where the storage knows folders."""

    def make() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            fs.makedirs(path, exist_ok=True)

    retried(make, url, "making", deadline_s)


def remove(url: str, deadline_s: float = 300.0) -> None:
    """Remove a file, or a folder with all it holds; nothing there is fine."""

    def drop() -> None:
        fs, path = filesystem(url)
        if fs.exists(path):
            fs.rm(path, recursive=True)

    retried(drop, url, "removing", deadline_s)


def move(source: str, target: str, deadline_s: float = 300.0) -> None:
    """Rename a file or folder: atomic on a local file system, copy and delete on an object store."""

    def rename() -> None:
        fs, path = filesystem(source)
        _, new_path = filesystem(target)
        if is_local(source):
            Path(path).rename(new_path)
            return
        # Copies come first and deletions last, so that a second attempt finds all that the first one left.
        files = fs.find(path)
        if not files:
            raise FileNotFoundError(source)
        for file in files:
            fs.cp_file(file, new_path.rstrip("/") + file.removeprefix(path.rstrip("/")))
        fs.rm(files)

    retried(rename, source, f"moving to {target}:", deadline_s)


def upload(path: str, url: str, deadline_s: float = 3600.0) -> None:
    """Copy a local file to `url`; a reader never sees a part of it."""

    def send() -> None:
        fs, target = filesystem(url)
        if is_local(url):
            fs.makedirs(parent(target), exist_ok=True)
            shutil.copyfile(path, target + ".partial")
            Path(target + ".partial").replace(target)
        else:
            fs.put_file(path, target)

    # One attempt may take the whole deadline: a quarter of it would cut off a large file each time, near its end.
    retried(send, url, "writing", deadline_s, attempt_s=deadline_s)


def download(url: str, path: str, expected: int | None = None, deadline_s: float = 3600.0) -> None:
    """Copy `url` to a local file, over what is there.

    Raises:
        StorageError: also where the file does not have the `expected` number of bytes.
    """

    def receive() -> None:
        fs, source = filesystem(url)
        fs.get_file(source, path)
        found = Path(path).stat().st_size
        if expected is not None and found != expected:
            raise StorageError(f"{url}: {found} bytes, its index says {expected}; index the data set again")

    retried(receive, url, "reading", deadline_s, attempt_s=deadline_s)
