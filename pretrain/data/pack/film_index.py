"""Index of a container's video, read by ranges; and where long videos are cut into pieces by it."""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pretrain.data.linked_video import INDEXED, UNSTAMPED, LinkedVideo, Range, Span
from pretrain.data.pack.discover import Item
from pretrain.data.pack.media_probe import video_stream
from pretrain.data.time_segment import Segment
from pretrain.errors import DataError, SampleError, StorageError
from pretrain.runtime import storage

logger = logging.getLogger(__name__)

#: FFmpeg opens a file by decoding its first frames, to learn what an index says as well.
UNTRIED = {"codec_whitelist": "none"}


def open_file(path: str) -> str | LinkedVideo:
    """Give what av.open takes for a path or URL.

    Raises:
        SampleError: "missing", or "storage" where access is denied.
        DataError: the store does not answer.
    """
    if "://" not in path:
        if not os.path.isfile(path):
            raise SampleError("missing", "no such file; relative paths in lists start at --data-root")
        return path
    return open_ranges(path)


def open_ranges(path: str) -> LinkedVideo:
    """Open a path or URL as a file that is read by ranges; errors as by `open_file`."""
    try:
        return LinkedVideo(path, Span(storage.size(path)))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise SampleError("missing", str(error)) from error
        if isinstance(error.__cause__, PermissionError):
            raise SampleError("storage", str(error)) from error
        raise DataError(f"{error}; when the store answers again, start the same command") from error


@dataclass(frozen=True)
class FilmIndex:
    """Content of a container's index about its video.

    Attributes:
        container: FFmpeg's name.
        bytes: of the file.
        duration: seconds.
        first: time stamp of the first frame, in ticks of `time_base`.
        time_base: seconds a tick.
        keys: (time stamp, byte) of every key frame, in order; empty where the container has no index.
        stamps: time stamps of all frames, where they are evenly spaced by the index.
        ranges: byte ranges of the file that tell all this.
    """

    container: str
    bytes: int
    duration: float
    first: int
    time_base: Fraction
    keys: tuple[tuple[int, int], ...]
    stamps: range | None
    ranges: tuple[Range, ...]

    def span(self, segment: Segment | None) -> Span:
        """Give what reading a segment of the file needs to know."""
        frames = None
        if segment is not None and self.keys:
            latest, (_, end) = segment.latest_key(self.first, self.time_base), segment.ticks(self.first, self.time_base)
            before = [place for stamp, place in self.keys if stamp <= latest] or [self.keys[0][1]]
            after = [place for stamp, place in self.keys if end is not None and stamp >= end]
            frames = before[-1], min([place for place in after if place > before[-1]], default=self.bytes)
        return Span(self.bytes, segment, self.stamps, self.ranges, frames)


def read_index(path: str) -> FilmIndex:
    """Read the index of the video at a path or URL, and nothing else of it where the container has one.

    Raises:
        SampleError: "missing", "storage", "unreadable" or "no-video".
        DataError: the store does not answer.
    """
    import av

    file = open_ranges(path)
    try:
        # Titles are in any encoding; PyAV would refuse the whole file for one that is not UTF-8.
        with av.open(file, mode="r", options=UNTRIED, metadata_errors="ignore") as container:
            video = video_stream(container)
            indexed = container.format.name in INDEXED
            if indexed:
                container.seek(video.start_time or 0, stream=video)  # Matroska's index is read at the first seek
            entries = list(video.index_entries) if indexed else []
            file.check()
            return FilmIndex(
                container.format.name,
                file.span.size,
                _duration(container, video),
                video.start_time or 0,
                video.time_base,
                _key_frames(video, entries),
                _even(video, [entry.timestamp for entry in entries]),
                tuple(file.used),
            )
    except (av.error.FFmpegError, UnicodeDecodeError, ValueError) as error:
        file.check()
        # Behind the check: FFmpeg reports a store that does not answer as a damaged file.
        raise SampleError("unreadable", str(error)) from error


def _duration(container: Any, video: Any) -> float:
    if video.duration:
        return float(video.duration * video.time_base)
    return (container.duration or 0) / 1e6


def _key_frames(video: Any, entries: list[Any]) -> tuple[tuple[int, int], ...]:
    # An mp4 lists decoding times, the first of which lies before the first frame's time by what decoding runs ahead.
    lead = (video.start_time or 0) - entries[0].timestamp if entries else 0
    return tuple((entry.timestamp + lead, entry.pos) for entry in entries if entry.is_keyframe)


def _even(video: Any, found: list[int]) -> range | None:
    """Find the even spacing of frames: that of their decoding times, where these are as many as the header says.

    It is a promise and no proof: readers hold it against every packet (decoders/pyav_reader.py).
    """
    if len(found) < 2 or len(found) != video.frames or video.start_time is None:
        return None
    step = found[1] - found[0]
    if step <= 0 or found != list(range(found[0], found[0] + len(found) * step, step)):
        return None
    if video.duration != len(found) * step:
        return None
    return range(video.start_time, video.start_time + len(found) * step, step)


def cut_items(items: Iterable[Item], seconds: float, at_keys: bool, threads: int = 16) -> list[Item]:
    """Cut long videos into pieces of `seconds`; a rest shorter than half of that belongs to the piece before it.

    Args:
        items: Videos; those that are segments already, and frame folders, stay as they are. So do files that can't be
            read: packing says what is wrong with them.
        seconds: Length of a piece.
        at_keys: Cut at the key frames nearest to where a piece would end, so that streams can be kept.
        threads: Files looked into at once.
    """

    def pieces(item: Item) -> list[Item]:
        if item.segment is not None or item.is_folder:
            return [item]
        try:
            index = read_index(item.path)
        except SampleError:
            return [item]
        if index.container in UNSTAMPED:
            logger.warning("%s: stays whole: its container stores no time stamps to cut at", item.path)
            return [item]
        found = [replace(item, segment=segment, size=index.bytes) for segment in _pieces(index, seconds, at_keys)]
        return found if len(found) > 1 else [item]

    with ThreadPoolExecutor(threads) as pool:
        return [piece for some in pool.map(pieces, items) for piece in some]


def _pieces(index: FilmIndex, seconds: float, at_keys: bool) -> list[Segment]:
    count = max(int(index.duration / seconds + 0.5), 1)
    cuts = [number * seconds for number in range(1, count)]
    if at_keys and index.keys:
        keys = [float((stamp - index.first) * index.time_base) for stamp, _ in index.keys]
        cuts = [min(keys, key=lambda key: abs(key - cut)) for cut in cuts]
    # To the microsecond, since bounds are part of keys and fingerprints.
    bounds = sorted({round(cut, 6) for cut in cuts} - {0.0})
    return [Segment(start, end) for start, end in zip([0.0, *bounds], [*bounds, None], strict=True)]
