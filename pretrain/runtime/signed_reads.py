"""Range reads from S3 by signed URLs, without what the client does anew for every request.

That takes s3fs 4 to 5 ms of processor time, a third of what decoding a clip takes; a GET of a URL signed before takes
1.3, signing 0.7 (docs/decisions.md). The client itself is first to read from a bucket, and reads after every failure
here: what is wrong, it finds out and says.
"""

import logging
import time
import urllib.request
from collections import Counter
from typing import Any, NamedTuple

import fsspec

from pretrain.runtime.retries import ATTEMPT_S

logger = logging.getLogger(__name__)

#: Seconds that a signed URL is good for, and those before its end in which it is used no more.
EXPIRES_S, EARLY_S = 3600, 300

#: Longest time of signing: new credentials may have to be fetched, seconds.
SIGN_S = 5.0

#: Files whose URLs are kept, most.
FILES = 4096

#: Reads by signed URLs that fail in a row, with one by the client that succeeds after each, before this way is given up
#: for a bucket. A store that throttles every second request gets there once in a thousand reads, an outage never.
STRIKES = 10

#: Connections kept open, and bytes between two looks at the time.
CONNECTIONS, PIECE = 32, 1 << 18


class Bucket(NamedTuple):
    """A bucket as some settings reach it; fsspec's own hash of a file system may differ between threads."""

    settings: str
    name: str


class SignedReads:
    """The signed URLs of a process. Threads share it: each of its changes is one operation on a dictionary or set."""

    def __init__(self) -> None:
        self._urls: dict[tuple[Bucket, str], tuple[str, float]] = {}
        #: Buckets that the client has read from since a read here failed.
        self._open: set[Bucket] = set()
        self._strikes: Counter[Bucket] = Counter()
        self._pool: Any = None

    def read(self, filesystem: Any, path: str, start: int, end: int, deadline_s: float) -> bytes | None:
        """Read the range [start, end) of a file; None where the client has to read it.

        Takes no longer than half of `deadline_s`, nor than one attempt of the client may.
        """
        if not _on_s3(filesystem) or (bucket := _bucket(filesystem, path)) not in self._open:
            return None
        deadline = time.monotonic() + min(ATTEMPT_S, deadline_s / 2)
        try:
            data = self._get(self._url(bucket, filesystem, path), start, end, deadline, *_timeouts(filesystem))
        except Exception as error:  # of credentials that can't sign, of urllib3, of sockets or ours
            self._failed(bucket, path, error)
            return None
        self._strikes[bucket] = 0
        return data

    def client_has_read(self, filesystem: Any, path: str) -> None:
        """Read the file's bucket by signed URLs from here on, if it is on S3 and nothing speaks against it."""
        proxied = set(urllib.request.getproxies()) - {"no"}  # the client knows them, and when to use them
        if not _on_s3(filesystem) or proxied:
            return
        bucket = _bucket(filesystem, path)
        if self._strikes[bucket] < STRIKES:
            self._open.add(bucket)

    def _url(self, bucket: Bucket, filesystem: Any, path: str) -> str:
        signed, good_until = self._urls.get((bucket, path), ("", 0.0))
        if time.monotonic() < good_until:
            return signed
        while len(self._urls) >= FILES:
            # With a default: another thread may have removed the same key meanwhile.
            self._urls.pop(next(iter(self._urls)), None)
        signed = filesystem.sign(path, expiration=EXPIRES_S, timeout=SIGN_S)
        self._urls[bucket, path] = signed, time.monotonic() + EXPIRES_S - EARLY_S
        return signed

    def _get(self, signed: str, start: int, end: int, deadline: float, connect_s: float, silence_s: float) -> bytes:
        import urllib3

        if self._pool is None:
            # No retries of its own, which would run past the deadline: after a failure the client reads, and retries.
            self._pool = urllib3.PoolManager(maxsize=CONNECTIONS, retries=False)
        wait = urllib3.Timeout(connect=connect_s, read=min(silence_s, deadline - time.monotonic()))
        asked = {"Range": f"bytes={start}-{end - 1}"}
        with self._pool.request("GET", signed, headers=asked, preload_content=False, timeout=wait) as answer:
            # Some servers call a range 200. A server that knows no ranges sends the whole file: not to be waited for.
            if answer.status not in (200, 206) or answer.headers.get("Content-Length") != str(end - start):
                raise ConnectionError(f"status {answer.status}")
            pieces = []
            # Not stream(), which gathers a whole piece first: a server that drips would never be given up on.
            while piece := answer.read1(PIECE):
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise TimeoutError
        if sum(map(len, pieces)) != end - start:
            raise ConnectionError("the answer was cut")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _failed(self, bucket: Bucket, path: str, error: Exception) -> None:
        self._urls.pop((bucket, path), None)
        if bucket not in self._open:
            return  # one of many threads' reads that failed together
        self._open.discard(bucket)
        self._strikes[bucket] += 1
        if self._strikes[bucket] == STRIKES:
            # Only the error's kind: urllib3's texts hold the URL, which is as good as the credentials for an hour.
            logger.warning(
                "storage: bucket %s can't be read by signed URLs (%s); the client reads it, at 3 ms of processor time "
                "more a request",
                *(bucket.name, type(error).__name__),
            )


def _on_s3(filesystem: Any) -> bool:
    protocols = filesystem.protocol
    return "s3" in ([protocols] if isinstance(protocols, str) else protocols)


def _timeouts(filesystem: Any) -> tuple[float, float]:
    """Return the seconds until a connection stands and between two pieces of an answer, as s3fs's client has them."""
    own = filesystem.config_kwargs
    return (
        own.get("connect_timeout", filesystem.connect_timeout),
        own.get("read_timeout", filesystem.read_timeout),
    )


def _bucket(filesystem: Any, path: str) -> Bucket:
    settings = fsspec.utils.tokenize(*filesystem.storage_args, **filesystem.storage_options)
    return Bucket(settings, path.split("/")[0])


#: Of this process.
SIGNED = SignedReads()
