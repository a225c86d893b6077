"""Reads and writes on any fsspec URL, with retries under one deadline.

Object-store clients retry by themselves, nested, for up to half an hour on a server that hangs; the deadline here
bounds the whole, and no call returns later.
"""

import contextlib
import posixpath
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity

from pretrain.errors import StorageError
from pretrain.runtime.outage import OUTAGES

T = TypeVar("T")

#: Errors that trying again can't cure.
PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

#: Packages whose errors are those of a network or a server, so that trying again may help.
CLIENTS = ("aiohttp", "aiobotocore", "botocore", "s3fs", "gcsfs", "adlfs", "azure", "google", "requests", "urllib3")

#: Errors of these packages that are wrong settings.
SETTINGS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")

#: Shortest time that one attempt on a remote store is given, seconds, unless the deadline comes first.
ATTEMPT_S = 30.0


def join(url: str, *parts: str) -> str:
    """Append path parts to a URL or local path."""
    return posixpath.join(url, *parts)


def parent(url: str) -> str:
    """The folder of a URL or local path."""
    return posixpath.dirname(url.rstrip("/"))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it; names the extra when its client is missing."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}.get(url.split("://")[0])
        hint = f"pip install 'tubelet[{extra}]'" if extra else str(error)
        raise StorageError(f"{url}: no client for this kind of storage is installed; {hint}") from error
    except ValueError as error:
        raise StorageError(f"{url}: {error}") from error


def is_local(url: str) -> bool:
    """Whether `url` is on a mounted file system, where files are renamed and locked."""
    return fsspec.utils.get_protocol(url) in ("file", "local")


def read_bytes(
    url: str, start: int | None = None, end: int | None = None, deadline_s: float = 300.0, denied_for_good: bool = True
) -> bytes:
    """The bytes of `url`, or of its range [start, end).

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

    def read() -> bytes:
        fs, path = filesystem(url)
        data: bytes = fs.cat_file(path, start=start, end=end)
        if start is not None and end is not None and len(data) != end - start:
            if int(fs.size(path)) >= end:
                raise ConnectionError(f"the answer ended after {len(data)} of {end - start} bytes")
            raise StorageError(
                f"{url}: {len(data)} bytes from {start} on instead of {end - start}: shorter than its index says"
            )
        return data

    return _retried(read, url, "reading", deadline_s, denied_for_good=denied_for_good)


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

    _retried(write, url, "writing", deadline_s)


def exists(url: str, deadline_s: float = 60.0) -> bool:
    """Whether a file or folder is at `url`; asks anew, since another machine may have written it meanwhile."""

    def look() -> bool:
        fs, path = filesystem(url)
        fs.invalidate_cache()
        return bool(fs.exists(path))

    return _retried(look, url, "looking for", deadline_s)


def size(url: str, deadline_s: float = 60.0, denied_for_good: bool = True) -> int:
    """Size of a file in bytes; see `read_bytes` for the arguments."""

    def look() -> int:
        fs, path = filesystem(url)
        return int(fs.size(path))

    return _retried(look, url, "looking for", deadline_s, denied_for_good=denied_for_good)


def list_names(url: str, deadline_s: float = 60.0) -> list[str]:
    """Names (without folder) of what lies directly in the folder `url`, sorted; a missing folder is empty."""

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

    return _retried(look, url, "listing", deadline_s)


def find(url: str, deadline_s: float = 600.0) -> dict[str, int]:
    """Every file below the folder `url`, at any depth: path relative to it -> bytes; sorted; empty without a folder."""

    def look() -> dict[str, int]:
        fs, path = filesystem(url)
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        found = fs.find(path, detail=True)
        return {name.removeprefix(root): int(found[name]["size"]) for name in sorted(found) if name != path}

    return _retried(look, url, "listing", deadline_s)


def glob(pattern: str, deadline_s: float = 60.0) -> list[str]:
    """URLs that match a shell pattern, sorted."""

    def look() -> list[str]:
        fs, path = filesystem(pattern)
        return sorted(name if is_local(pattern) else fs.unstrip_protocol(name) for name in fs.glob(path))

    return _retried(look, pattern, "listing", deadline_s)


def make_folder(url: str, deadline_s: float = 60.0) -> None:
    """Make a folder and those above it, where the storage knows folders."""

    def make() -> None:
        fs, path = filesystem(url)
        if is_local(url):
            fs.makedirs(path, exist_ok=True)

    _retried(make, url, "making", deadline_s)


def remove(url: str, deadline_s: float = 300.0) -> None:
    """Remove a file, or a folder with all it holds; nothing there is fine."""

    def drop() -> None:
        fs, path = filesystem(url)
        if fs.exists(path):
            fs.rm(path, recursive=True)

    _retried(drop, url, "removing", deadline_s)


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

    _retried(rename, source, f"moving to {target}:", deadline_s)


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

    _retried(send, url, "writing", deadline_s, attempt_s=deadline_s)


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

    _retried(receive, url, "reading", deadline_s, attempt_s=deadline_s)


def transient(error: BaseException) -> bool:
    """Whether trying again may cure an error: those of networks and servers, not ours and not wrong settings."""
    if isinstance(error, OSError):
        return not isinstance(error, PERMANENT)
    kind = type(error)
    return kind.__module__.split(".")[0] in CLIENTS and kind.__name__ not in SETTINGS


def _retried(
    call: Callable[[], T],
    url: str,
    what: str,
    deadline_s: float,
    attempt_s: float | None = None,
    denied_for_good: bool = True,
) -> T:
    protocol = fsspec.utils.get_protocol(url)
    with contextlib.suppress(ImportError, ValueError):  # `call` says what is missing
        fsspec.get_filesystem_class(protocol)  # importing a client takes seconds on a busy machine, and is no waiting
    begin = time.monotonic()
    end = begin + deadline_s
    longest = max(ATTEMPT_S, deadline_s / 4) if attempt_s is None else attempt_s
    # Only network clients can hang for ever; a local or in-memory call needs no thread to be given up on.
    remote = protocol not in ("file", "local", "memory")

    def attempt() -> T:
        return _within(call, min(longest, max(end - time.monotonic(), 0.1))) if remote else call()

    def retry(error: BaseException) -> bool:
        return transient(error) or (remote and not denied_for_good and isinstance(error, PermissionError))

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        OUTAGES.failed(f"{what} {url}", error or TimeoutError(), end - time.monotonic())

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(deadline_s) | tenacity.stop_before_delay(deadline_s),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=20),
        retry=tenacity.retry_if_exception(retry),
        before_sleep=tell,
        reraise=True,
    )
    try:
        result = retrying(attempt)
    except StorageError:
        raise
    except Exception as error:
        tried = f" (tried again for {time.monotonic() - begin:.0f} s)" if retry(error) else ""
        raise StorageError(f"{what} {url}: {type(error).__name__}: {error}{tried}") from error
    if retrying.statistics["attempt_number"] > 1:
        OUTAGES.recovered(f"{what} {url}", time.monotonic() - begin)
    return result


def _within(call: Callable[[], T], seconds: float) -> T:
    """Run `call` and give up on it after `seconds`; a daemon thread, because a hung one must not keep the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="storage").start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError as error:
        if future.done():
            raise
        raise TimeoutError(f"no answer for {seconds:.0f} s") from error
