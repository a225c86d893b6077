"""Reads and writes on any fsspec URL, with retries under one deadline.

Object-store clients retry by themselves, nested, for up to half an hour; the deadline here bounds the whole.
"""

import logging
import posixpath
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
import tenacity

from pretrain.errors import StorageError

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Errors that trying again can't cure.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ValueError)


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or local path."""
    return posixpath.join(url, *parts)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it; names the extra when its client is missing."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}.get(url.split("://")[0])
        hint = f"pip install 'tubelet[{extra}]'" if extra else str(error)
        raise StorageError(f"{url}: no client for this kind of storage is installed; {hint}") from error


def read_bytes(url: str, start: int | None = None, end: int | None = None, deadline_s: float = 300.0) -> bytes:
    """The bytes of `url`, or of its range [start, end).

    Raises:
        StorageError: still failing when `deadline_s` has passed, or failing for good.
    """

    def read() -> bytes:
        fs, path = filesystem(url)
        data: bytes = fs.cat_file(path, start=start, end=end)
        if start is not None and end is not None and len(data) != end - start:
            raise OSError(f"{len(data)} bytes instead of {end - start}: the object is shorter than its index says")
        return data

    return _retried(read, f"reading {url}", deadline_s)


def write_bytes(url: str, data: bytes, deadline_s: float = 300.0) -> None:
    """Write `data` to `url`, whole or not at all (local files are renamed into place)."""

    def write() -> None:
        fs, path = filesystem(url)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if "file" in fs.protocol:
            fs.pipe_file(path + ".partial", data)
            fs.mv(path + ".partial", path)
        else:
            fs.pipe_file(path, data)

    _retried(write, f"writing {url}", deadline_s)


def exists(url: str, deadline_s: float = 60.0) -> bool:
    """Whether a file or folder is at `url`."""

    def look() -> bool:
        fs, path = filesystem(url)
        return bool(fs.exists(path))

    return _retried(look, f"looking for {url}", deadline_s)


def upload(local: str, url: str, deadline_s: float = 3600.0) -> None:
    """Copy the local file `local` to `url`, whole or not at all; large files go up in parts where the store can."""

    def put() -> None:
        fs, path = filesystem(url)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        target = path + ".partial" if "file" in fs.protocol else path
        fs.put_file(local, target)
        if target != path:
            fs.mv(target, path)

    _retried(put, f"writing {url}", deadline_s)


def size(url: str, deadline_s: float = 60.0) -> int:
    """Size of the file at `url`, bytes."""

    def look() -> int:
        fs, path = filesystem(url)
        return int(fs.info(path)["size"])

    return _retried(look, f"looking for {url}", deadline_s)


def find(url: str, deadline_s: float = 600.0) -> dict[str, int]:
    """Every file below the folder `url`, at any depth: path relative to it -> bytes; sorted; empty without a folder."""

    def look() -> dict[str, int]:
        fs, path = filesystem(url)
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        found = fs.find(path, detail=True)
        return {name.removeprefix(root): int(found[name]["size"]) for name in sorted(found) if name != path}

    return _retried(look, f"listing {url}", deadline_s)


def remove(url: str, deadline_s: float = 60.0) -> None:
    """Delete the file at `url`; fine when there is none."""

    def delete() -> None:
        fs, path = filesystem(url)
        try:
            fs.rm_file(path)
        except FileNotFoundError:
            pass

    _retried(delete, f"deleting {url}", deadline_s)


def _retried(call: Callable[[], T], what: str, deadline_s: float) -> T:
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(deadline_s),
        wait=tenacity.wait_exponential_jitter(initial=0.2, max=20),
        retry=tenacity.retry_if_exception(
            lambda e: isinstance(e, Exception) and not isinstance(e, (*PERMANENT, StorageError))
        ),
        before_sleep=tenacity.before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )
    try:
        return retrying(call)
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"{what}: {type(error).__name__}: {error}") from error
