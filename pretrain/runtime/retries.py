"""Trying again under one deadline what a network or a server may refuse.

Object-store clients retry by themselves, nested, for up to half an hour on a server that hangs; the deadline here
bounds the whole, and no call returns later.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

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

#: How long a file is looked for that was there when the run started, seconds.
MISSING_S = 10.0

#: Shortest time that one attempt on a remote store is given, seconds, unless the deadline comes first.
ATTEMPT_S = 30.0


#: Times that bytes which arrive damaged in ever other ways are asked for again: with five, a link that spoils a third
#: of all answers ends one of every 700 reads.
READS = 20


def undamaged(read: Callable[[], bytes], right: Callable[[bytes], bool], data: bytes = b"") -> bytes:
    """Read until the bytes are right, or wrong in the same way twice.

    A bit may flip on the way, and flips elsewhere the next time; what is damaged at its source comes alike again. Read
    once more and no further, two flips in a row would blame a sound file.

    Args:
        read: Asks the source.
        right: Tells whether bytes are those that were written.
        data: What came already, and was wrong.

    Returns:
        The bytes; where they are still wrong, the last that came.
    """
    for _ in range(READS):
        before, data = data, read()
        if data == before or right(data):
            break
    return data


def transient(error: BaseException) -> bool:
    """Tell whether trying again may cure an error: those of networks and servers, not ours and not wrong settings."""
    if isinstance(error, OSError):
        return not isinstance(error, PERMANENT)
    kind = type(error)
    return kind.__module__.split(".")[0] in CLIENTS and kind.__name__ not in SETTINGS


def retried(
    call: Callable[[], T],
    url: str,
    what: str,
    deadline_s: float,
    attempt_s: float | None = None,
    denied_for_good: bool = True,
) -> T:
    """Call `call`, which works on `url`, until it succeeds, and return its result.

    Args:
        call: Reads or writes; may be called many times, and on another thread.
        url: What it works on.
        what: What it does to it, for messages: "reading".
        deadline_s: Longest time of all attempts together, seconds.
        attempt_s: Longest time of one attempt on a remote store; None: a quarter of the deadline, or ATTEMPT_S.
        denied_for_good: Whether a denied access is an error at once, see `storage.read_bytes`.

    Raises:
        StorageError: still failing when `deadline_s` has passed, or failing for good.
    """
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
        if transient(error):
            return True
        # What was there a moment ago may be so again: a gateway that restarts answers 404 as well as 503.
        passing = isinstance(error, FileNotFoundError) and time.monotonic() - begin < MISSING_S
        return remote and not denied_for_good and (passing or isinstance(error, PermissionError))

    def tell(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        OUTAGES.failed(f"{what} {url}", error or TimeoutError(), end - time.monotonic())

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(deadline_s) | tenacity.stop_before_delay(deadline_s),
        # Random pauses: thousands of workers that failed together must not come back together.
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
            # Since Python 3.11 a TimeoutError of `call` itself is the same class, and says more than the one below.
            raise
        raise TimeoutError(f"no answer for {seconds:.0f} s") from error
