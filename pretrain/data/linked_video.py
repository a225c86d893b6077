"""A video that stays where it lies: a file for FFmpeg whose bytes are fetched as they are needed.

A film of two hours has some hundred megabytes; a clip of it needs the container's index and what lies between a key
frame and the clip's end. Blocks that were read are kept up to a limit, so that a reader never holds more than that.
"""

import functools
import io
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from pretrain.data.index import store_error
from pretrain.data.time_segment import Segment
from pretrain.errors import DataError, SampleError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import SAMPLE_JSON_BYTES, parse_json

logger = logging.getLogger(__name__)

Range = tuple[int, int]

#: Containers, by FFmpeg's names, whose index lists the key frames, so that seeking in them is exact and cheap.
MATROSKA = "matroska,webm"
INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", MATROSKA)
#: Containers that store no presentation time stamps.
UNSTAMPED = ("avi", "h264", "hevc", "m4v")

BLOCK = 1 << 16
#: Most blocks that one request fetches: it doubles while a file is read in sequence.
AHEAD = 16
#: Bytes of a file that are kept in memory, most.
LIMIT = 8 << 20
#: Share of the deadline that may pass in reads while a sample is decoded: after all of it the decoder counts as hung
#: (crashes.py), which would make an unreachable store a bad sample.
PATIENCE = 0.75
#: Files whose sizes a process remembers.
FILES = 4096
_TOLD: set[str] = set()


@dataclass(frozen=True)
class Span:
    """Part of a linked file that a sample is, and its place in the file: the content of a `.span` member.

    Attributes:
        size: bytes of the file.
        segment: the piece that is meant; None: the whole video.
        stamps: time stamps of all frames of the file in its stream's ticks, as its index says; None where they are not
            evenly spaced or not known.
        index: byte ranges of the container's header and index.
        frames: byte range from the segment's first key frame to the one after its end; None where it is not known.
    """

    size: int
    segment: Segment | None = None
    stamps: range | None = None
    index: tuple[Range, ...] = ()
    frames: Range | None = None

    def to_json(self) -> bytes:
        """Write it as it is stored."""
        content: dict[str, Any] = {"bytes": self.size, "index": self.index}
        if self.segment is not None:
            content |= {"start": self.segment.start, "end": self.segment.end}
        if self.frames is not None:
            content["frames"] = self.frames
        if self.stamps is not None:
            content["stamps"] = {"first": self.stamps.start, "step": self.stamps.step, "count": len(self.stamps)}
        return json.dumps(content, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read a stored one.

        Raises:
            SampleError: "index" for anything else.
        """
        try:
            content = parse_json(data, SAMPLE_JSON_BYTES)
            stamps = content.get("stamps")
            return cls(
                int(content["bytes"]),
                Segment.checked(content["start"], content["end"]) if "start" in content else None,
                stamps and range(stamps["first"], stamps["first"] + stamps["count"] * stamps["step"], stamps["step"]),
                tuple((int(begin), int(end)) for begin, end in content["index"]),
                (int(content["frames"][0]), int(content["frames"][1])) if "frames" in content else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise SampleError("index", f"its .span can't be read ({error}); index the videos again") from error


class LinkedVideo(io.RawIOBase):
    """A seekable file over byte ranges of a URL.

    Args:
        url: Of the file, or its path.
        span: What of it is meant.
        deadline_s: Longest time of one read, retries included, seconds.

    Attributes:
        fetched: Bytes that the storage handed out so far.
        requests: In how many answers.
        used: Ranges that were read from here, merged where they touch, in the order of reading.
        error: What the storage said when it failed; from then on there is nothing to read.
    """

    def __init__(self, url: str, span: Span, deadline_s: float = 300.0) -> None:
        super().__init__()
        self.url, self.span = url, span
        self.fetched = self.requests = 0
        self.used: list[Range] = []
        self.error: SampleError | DataError | None = None
        self._deadline_s, self._left_s = deadline_s, PATIENCE * deadline_s
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._place = 0
        self._next, self._ahead = -1, 1

    def readable(self) -> bool:
        """Return True: FFmpeg reads it."""
        return True

    def seekable(self) -> bool:
        """Return True: any byte can be asked for."""
        return True

    def tell(self) -> int:
        """Return the place of the next read, bytes."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place; returns it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.span.size}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def read(self, size: int = -1, /) -> bytes:
        """Read up to `size` bytes, all that is left for -1, fewer only at the file's end and where the storage fails.

        FFmpeg is what reads, and no exception passes through C code: whoever lets it read asks `check` afterwards.
        """
        end = self.span.size if size < 0 else min(self._place + size, self.span.size)
        begin, parts = self._place, []
        try:
            while self._place < end and self.error is None:
                number, skipped = divmod(self._place, BLOCK)
                parts.append(self._block(number)[skipped : skipped + end - self._place])
                self._place += len(parts[-1])
        except (SampleError, DataError):
            logger.debug("%s: read failed", self.url, exc_info=True)
        if parts:
            self._note(begin, self._place)
        return b"".join(parts)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def whole(self) -> bytes:
        """Read the whole file, for decoders that need it; nothing of it is kept here.

        Raises:
            SampleError, DataError: see `_fetch`.
        """
        return self._fetch(0, self.span.size)

    def prefetch(self) -> None:
        """Fetch the index and the segment's frames, as far as they fit; a reader's thread then waits for nothing.

        Raises:
            SampleError, DataError: see `_fetch`.
        """
        self._check_size()
        wanted = [*self.span.index, *([self.span.frames] if self.span.frames else [])]
        for first, last in _block_runs(wanted):
            # Not to the limit: what is read now must not be pushed out by the first blocks that are read later.
            if (len(self._blocks) + last - first) * BLOCK > LIMIT - 2 * AHEAD * BLOCK:
                break
            self._keep(first, self._fetch(first * BLOCK, min(last * BLOCK, self.span.size)))
        # A reader's thread waited for these bytes; decoding has its own time.
        self._left_s = PATIENCE * self._deadline_s

    def _check_size(self) -> None:
        # Else one that has grown, or was replaced by a larger one, would be read at byte ranges of another file.
        try:
            found = _size_of(self.url, self._deadline_s)
        except StorageError as error:
            raise linked_error(self.url, error) from error
        if found != self.span.size:
            raise SampleError("changed", f"{self.url}: {found} bytes now, {self.span.size} when it was indexed")

    def check(self) -> None:
        """Raise what the storage said, if it failed."""
        if self.error is not None:
            raise self.error

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
            return block
        self._ahead = min(2 * self._ahead, AHEAD) if number == self._next else 1
        last = number + 1
        while last < number + self._ahead and last not in self._blocks:
            last += 1
        self._next = last
        self._keep(number, self._fetch(number * BLOCK, min(last * BLOCK, self.span.size)))
        return self._blocks[number]

    def _keep(self, first: int, data: bytes) -> None:
        while self._blocks and len(self._blocks) * BLOCK + len(data) > LIMIT:
            self._blocks.popitem(last=False)
        for begin in range(0, len(data), BLOCK):
            self._blocks[first + begin // BLOCK] = data[begin : begin + BLOCK]

    def _fetch(self, begin: int, end: int) -> bytes:
        """Fetch a range from the storage.

        Raises:
            SampleError: "missing" where the file is gone, "changed" where its size is another.
            DataError: the storage does not hand it out until the deadline.
        """
        began = time.monotonic()
        try:
            data = storage.read_bytes(self.url, begin, end, max(self._left_s, 0.1), denied_for_good=False)
        except StorageError as error:
            self.error = self._changed(error) or linked_error(self.url, error)
            raise self.error from error
        self._left_s -= time.monotonic() - began
        self.fetched, self.requests = self.fetched + len(data), self.requests + 1
        return data

    def _changed(self, error: StorageError) -> SampleError | None:
        """Build the error of a file that is another than when it was indexed, a matter of its sample; else None."""
        try:
            # One second: the read has waited for its deadline already, and a store that is gone must not take it twice.
            found = storage.size(self.url, 1.0)
        except StorageError:
            return None
        if found == self.span.size:
            return None
        return SampleError("changed", f"{error}: {found} bytes now, {self.span.size} when the videos were indexed")

    def _note(self, begin: int, end: int) -> None:
        if self.used and self.used[-1][1] == begin:
            begin = self.used.pop()[0]
        self.used.append((begin, end))


#: A video as a sample holds it: its bytes, or what fetches them.
VideoFile = bytes | LinkedVideo


@dataclass(frozen=True)
class StillImage:
    """An image file where a video is asked for: a video of one frame."""

    content: bytes


#: What clips are cut from.
Footage = VideoFile | StillImage


@functools.lru_cache(maxsize=FILES)
def _size_of(url: str, deadline_s: float) -> int:
    """Look up the size of a file; once for its many segments, since an object store takes a request for it."""
    return storage.size(url, deadline_s, denied_for_good=False)


def linked_error(url: str, error: StorageError) -> SampleError | DataError:
    """Build the error that a failed read of a linked file means: one that is gone is a matter of its sample."""
    if isinstance(error.__cause__, FileNotFoundError):
        return SampleError("missing", str(error))
    return store_error(url, error)


def open_link(where: str, span: bytes | None, deadline_s: float) -> VideoFile:
    """Open the video at a path or URL: ready to be read as its span says, or whole without one.

    Raises:
        SampleError, DataError: see `linked_error`.
    """
    if span is not None:
        video = LinkedVideo(where, Span.from_json(span), deadline_s)
        video.prefetch()
        return video
    try:
        return storage.read_bytes(where, deadline_s=deadline_s, denied_for_good=False)
    except StorageError as error:
        raise linked_error(where, error) from error


def tell_whole(url: str, why: str) -> None:
    """Say that all of a file is read, once in a process for each reason: the files of a data set are of one kind."""
    if why not in _TOLD:
        _TOLD.add(why)
        logger.warning("%s: %s: all of it is read for every sample, and so are others like it; pack them", url, why)


def _block_runs(ranges: Iterable[Range]) -> list[Range]:
    """List the blocks of some byte ranges, as runs [first, last) in the order given, none twice."""
    runs: list[Range] = []
    seen: set[int] = set()
    for begin, end in ranges:
        for number in range(begin // BLOCK, -(-end // BLOCK)):
            if number in seen:
                continue
            seen.add(number)
            if runs and runs[-1][1] == number:
                runs[-1] = runs[-1][0], number + 1
            else:
                runs.append((number, number + 1))
    return runs
