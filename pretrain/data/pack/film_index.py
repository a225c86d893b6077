"""A container's index of its video, read by ranges; and the cutting of long videos into pieces by it."""

import itertools
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pretrain.data.linked_video import INDEXED, UNSTAMPED, LinkedVideo, Range, Span
from pretrain.data.pack import originals
from pretrain.data.pack.discover import Item
from pretrain.data.pack.media_probe import video_stream
from pretrain.data.pack.originals import check_local
from pretrain.data.time_segment import Segment
from pretrain.errors import SampleError

logger = logging.getLogger(__name__)

#: FFmpeg opens a file by decoding its first frames, to learn what an index says as well.
UNTRIED = {"codec_whitelist": "none"}
#: Most frames that a codec decodes before one that is shown earlier.
REORDERED = 16


def open_file(path: str) -> str | LinkedVideo:
    """Turn a path or URL into what av.open takes.

    Raises:
        SampleError: "missing", or "storage" where access is denied.
        DataError: the store does not answer.
    """
    check_local(path)
    return open_ranges(path) if "://" in path else path


def open_ranges(path: str) -> LinkedVideo:
    """Open a path or URL as a file that is read by ranges; errors as by `open_file`."""
    return LinkedVideo(path, Span(originals.size(path)))


def _stamp(key: tuple[int, int]) -> int:
    return key[0]


@dataclass(frozen=True)
class FilmIndex:
    """Facts of a container's index about its video.

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
        """Build what reading a segment of the file needs to know."""
        frames = None
        if segment is not None and self.keys:
            latest, (_, end) = segment.latest_key(self.first, self.time_base), segment.ticks(self.first, self.time_base)
            _, begins = self.keys[max(bisect_right(self.keys, latest, key=_stamp) - 1, 0)]
            behind = len(self.keys) if end is None else bisect_left(self.keys, end, key=_stamp)
            later = (place for _, place in itertools.islice(self.keys, behind, None) if place > begins)
            frames = begins, next(later, self.bytes)
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
        with av.open(file, mode="r", options=UNTRIED, metadata_errors="ignore") as container:
            video = video_stream(container)
            indexed = container.format.name in INDEXED
            if indexed:
                container.seek(video.start_time or 0, stream=video)  # Matroska's index is read at the first seek
            entries = list(video.index_entries) if indexed else []
            # FFmpeg takes a failed read for the end of the file: a store that is gone must not pass for a short index.
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
        raise SampleError("unreadable", str(error)) from error


def _duration(container: Any, video: Any) -> float:
    if video.duration:
        return float(video.duration * video.time_base)
    return (container.duration or 0) / 1e6


def _key_frames(video: Any, entries: list[Any]) -> tuple[tuple[int, int], ...]:
    if not entries:
        return ()
    # What an edit list hides at the beginning lies before the first frame shown, in part behind it in decoding order.
    shown = next((number for number, entry in enumerate(entries) if not entry.is_discard), 0)
    hidden = sum(entry.is_discard for entry in entries[: shown + REORDERED])
    # An mp4 lists decoding times, the first of which lies before the first frame's time by what decoding runs ahead.
    lead = (video.start_time or 0) - entries[hidden].timestamp
    return tuple((entry.timestamp + lead, entry.pos) for entry in entries if entry.is_keyframe)


def _even(video: Any, found: list[int]) -> range | None:
    """Infer even time stamps of the frames from decoding times that are even, and as many as the header says.

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


def _nearest(ascending: Sequence[float], value: float) -> float:
    place = bisect_left(ascending, value)
    return min(ascending[max(place - 1, 0) : place + 1], key=lambda one: abs(one - value))


def cut_items(
    items: Iterable[Item],
    seconds: float,
    at_keys: bool,
    threads: int = 16,
    indexes: dict[str, FilmIndex] | None = None,
) -> list[Item]:
    """Cut long videos into pieces of `seconds`; a rest shorter than half of that belongs to the piece before it.

    Args:
        items: Videos; those that are segments already, and frame folders, stay as they are. So do files that can't be
            read: packing says what is wrong with them.
        seconds: Length of a piece.
        at_keys: Cut at the key frames nearest to where a piece would end, so that streams can be kept.
        threads: Files looked into at once.
        indexes: Filled with what was read, by path, for `write_links`.
    """

    def pieces(item: Item) -> list[Item]:
        if item.segment is not None or item.is_folder:
            return [item]
        try:
            index = read_index(item.path)
        except SampleError:
            return [item]
        if indexes is not None:
            indexes[item.path] = index
        why = "its container stores no time stamps to cut at" if index.container in UNSTAMPED else ""
        if not index.duration:
            why = why or "its header states no duration, as a live recording's; convert it (ffmpeg -i IN -c copy OUT)"
        if why:
            logger.warning("%s: stays whole: %s", item.path, why)
            return [item]
        found = [replace(item, segment=segment, size=index.bytes) for segment in _pieces(index, seconds, at_keys)]
        return found if len(found) > 1 else [item]

    with ThreadPoolExecutor(threads) as pool:
        return [piece for some in pool.map(pieces, items) for piece in some]


def _pieces(index: FilmIndex, seconds: float, at_keys: bool) -> list[Segment]:
    count = max(int(index.duration / seconds + 0.5), 1)
    cuts = [number * seconds for number in range(1, count)]
    if at_keys and index.keys:
        # Not before the first frame, where an edit list hides some.
        keys = [max(float((stamp - index.first) * index.time_base), 0.0) for stamp, _ in index.keys]
        # Between key frames a piece would have to be encoded anew, or read from the key frame before it.
        cuts = [_nearest(keys, cut) for cut in cuts]
    # To the microsecond, since bounds are part of keys and fingerprints.
    bounds = sorted({round(cut, 6) for cut in cuts} - {0.0})
    return [Segment(start, end) for start, end in zip([0.0, *bounds], [*bounds, None], strict=True)]
