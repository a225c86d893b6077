"""Range reads from S3 by signed URLs, without what the client does anew for every request.

That takes s3fs 4 to 5 ms of processor time, a third of what decoding a clip takes; a GET of a URL signed before takes
1.3 (docs/decisions.md). A file's URL is signed after the client itself has read from the file, and used until a
read fails in any way: then the client reads, finds out what is wrong and says it.
"""

import logging
import time
import urllib.request
from collections import Counter
from typing import Any

from pretrain.runtime.retries import ATTEMPT_S

logger = logging.getLogger(__name__)

#: Seconds that a signed URL is good for, and those before its end in which it is used no more.
EXPIRES_S, EARLY_S = 3600, 300

#: Files whose URLs are kept, most.
FILES = 4096

#: Reads by signed URLs that fail in a bucket where none has succeeded, before this way is given up for it.
STRIKES = 3

#: Connections kept open, and bytes between two looks at the time.
CONNECTIONS, PIECE = 32, 1 << 18


class SignedReads:
    """The signed URLs of a process. Threads share it: each of its changes is one operation on a dictionary."""

    def __init__(self) -> None:
        self._urls: dict[tuple[int, str], tuple[str, float]] = {}
        self._proven: set[tuple[int, str]] = set()
        self._strikes: Counter[tuple[int, str]] = Counter()
        self._pool: Any = None

    def read(self, filesystem: Any, path: str, start: int, end: int, deadline_s: float) -> bytes | None:
        """The range [start, end) of a file of which `learn` was told; None where the client has to read it.

        Takes no longer than half of `deadline_s`, nor than one attempt of the client may.
        """
        signed, good_until = self._urls.get((hash(filesystem), path), ("", 0.0))
        now = time.monotonic()
        if now > good_until:
            return None
        try:
            data = self._get(signed, start, end, now + min(ATTEMPT_S, deadline_s / 2), *_timeouts(filesystem))
        except Exception as error:  # of urllib3, of sockets or ours: the client will say what is wrong
            self._urls.pop((hash(filesystem), path), None)
            self._strike(_bucket(filesystem, path), error)
            return None
        self._proven.add(_bucket(filesystem, path))
        return data

    def learn(self, filesystem: Any, path: str) -> None:
        """Sign the URL of a file that the client has just read from, if it is on S3 and nothing speaks against it."""
        protocols = [filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol
        proxied = set(urllib.request.getproxies()) - {"no"}  # the client knows them, and when to use them
        bucket = _bucket(filesystem, path)
        if "s3" not in protocols or proxied or self._given_up(bucket):
            return
        try:
            signed = filesystem.sign(path, expiration=EXPIRES_S)
        except Exception as error:  # some credentials can't sign; the client has read with them
            self._strike(bucket, error)
            return
        while len(self._urls) >= FILES:
            self._urls.pop(next(iter(self._urls)), None)
        self._urls[hash(filesystem), path] = signed, time.monotonic() + EXPIRES_S - EARLY_S

    def _get(
        self, signed: str, start: int, end: int, deadline: float, connect_s: float, silence_s: float
    ) -> bytes:
        import urllib3

        if self._pool is None:
            self._pool = urllib3.PoolManager(maxsize=CONNECTIONS, retries=False)
        wait = urllib3.Timeout(connect=connect_s, read=min(silence_s, deadline - time.monotonic()))
        asked = {"Range": f"bytes={start}-{end - 1}"}
        with self._pool.request("GET", signed, headers=asked, preload_content=False, timeout=wait) as answer:
            # Some servers call a range 200. A server that knows no ranges sends the whole file: not to be waited for.
            if answer.status not in (200, 206) or answer.headers.get("Content-Length") != str(end - start):
                raise ConnectionError(f"status {answer.status}")
            pieces = []
            for piece in answer.stream(PIECE):
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise TimeoutError
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _strike(self, bucket: tuple[int, str], error: Exception) -> None:
        self._strikes[bucket] += 1
        if self._given_up(bucket) and self._strikes[bucket] == STRIKES:
            # Only the error's kind: urllib3's texts hold the URL, which is as good as the credentials for an hour.
            logger.warning(
                "storage: bucket %s can't be read by signed URLs (%s); the client reads it, at 3 ms of processor time "
                "more a request",
                *(bucket[1], type(error).__name__),
            )

    def _given_up(self, bucket: tuple[int, str]) -> bool:
        return self._strikes[bucket] >= STRIKES and bucket not in self._proven


def _timeouts(filesystem: Any) -> tuple[float, float]:
    """Seconds until a connection stands and between two pieces of an answer, as the client of s3fs has them."""
    own = filesystem.config_kwargs
    return (
        own.get("connect_timeout", filesystem.connect_timeout),
        own.get("read_timeout", filesystem.read_timeout),
    )


def _bucket(filesystem: Any, path: str) -> tuple[int, str]:
    """A bucket as some settings reach it: fsspec's file systems hash by their settings."""
    return hash(filesystem), path.split("/")[0]


#: Of this process.
SIGNED = SignedReads()
