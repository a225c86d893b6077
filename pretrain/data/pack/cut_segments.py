"""Segments of videos, cut out for packing: the packets from the key frame before their start on, and nothing else."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from pretrain.data.linked_video import INDEXED, MATROSKA, UNSTAMPED, LinkedVideo
from pretrain.data.pack.colour import same_colours
from pretrain.data.pack.encode import MP4_OPTIONS, add_copy, with_decoding_times
from pretrain.data.pack.film_index import open_file
from pretrain.data.pack.media_probe import video_stream
from pretrain.data.time_segment import Segment
from pretrain.errors import SampleError

#: Sound may lie this far from the pictures that it belongs to, seconds.
SKEW_S = 2


@dataclass(frozen=True)
class CutSegment:
    """A segment cut out of its file, as a local file of its own.

    Attributes:
        path: of that file; its packets are those of the original, from the key frame before the segment on.
        shown: time stamps, in its ticks, of the frames that belong to the segment.
        whole: no frame in it belongs to anything else, so that the stream can be kept.
        container: FFmpeg's name of the original's.
        size: bytes of the original.
        bytes_read: bytes of the original that were read, as far as known.
        sha256: hash of the packets and of which of them are shown.
    """

    path: str
    shown: range
    whole: bool
    container: str
    size: int
    bytes_read: int
    sha256: str


@contextmanager
def cut_out(path: str, segment: Segment, folder: str, audio: bool) -> Iterator[CutSegment]:
    """Cut a segment of the video at a path or URL into a file in the local `folder` that is deleted in the end.

    Raises:
        SampleError: "missing", "storage", "unreadable", "segment" where no frame is shown in it, or "unstamped".
        DataError: the store does not answer.
    """
    import av

    file = open_file(path)
    errors = []
    for ending in (".mp4", ".mkv"):  # what mp4 can't hold: some codecs, and colours that only Matroska states
        with tempfile.NamedTemporaryFile(dir=folder, suffix=ending) as target:
            try:
                with av.open(file, metadata_errors="ignore") as container:
                    piece = _copy_segment(container, segment, target.name, audio)
            except (av.error.FFmpegError, UnicodeDecodeError, ValueError) as error:
                if isinstance(file, LinkedVideo):
                    # FFmpeg takes a failed read for damage: what the storage said comes first.
                    file.check()
                    file.seek(0)
                errors.append(error)
                continue
            if isinstance(file, LinkedVideo):
                file.check()
            size = file.span.size if isinstance(file, LinkedVideo) else os.path.getsize(path)
            read = file.fetched if isinstance(file, LinkedVideo) else os.path.getsize(target.name)
            yield replace(piece, size=size, bytes_read=read)
            return
    raise SampleError("unreadable", str(errors[0])) from errors[0]


def _copy_segment(container: Any, segment: Segment, target: str, audio: bool) -> CutSegment:
    import av

    video = video_stream(container)
    sounds = [s for s in container.streams.audio[:1] if audio and s.codec_context is not None]
    for stream in container.streams:
        if stream is not video and stream not in sounds:
            # The demuxer then leaves out the bytes of other streams, which would be fetched too.
            stream.discard = av.stream.Discard.all
    window = _Window(container, video, sounds, segment)
    options = MP4_OPTIONS if target.endswith(".mp4") else {"fflags": "+bitexact"}
    with av.open(target, "w", format="mp4" if target.endswith(".mp4") else "matroska", options=options) as out:
        copies = {stream.index: add_copy(out, stream) for stream in [video, *sounds]}
        for packet in window.packets():
            shift = round(window.shift_s / packet.time_base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = copies[packet.stream.index]
            out.mux(packet)
    first, last = window.first - window.shift, window.last - window.shift
    with av.open(target) as copy:
        written = video_stream(copy)
        if target.endswith(".mp4") and not same_colours(video.codec_context, written.codec_context):
            raise ValueError("mp4 does not hold the matrix or range of its colours")
        # The writer may choose a time base of its own.
        ratio = video.time_base / written.time_base
    return CutSegment(
        target, range(round(first * ratio), round(last * ratio) + 1), window.whole, container.format.name, 0, 0,
        window.digest.hexdigest(),
    )  # fmt: skip


class _Window:
    """The packets of a segment, from the key frame before it to the last that it needs.

    Attributes:
        shift: time stamp of that key frame, in the video's ticks; `shift_s` in seconds.
        first, last: smallest and largest time stamp of the segment's frames.
        whole: all video packets are shown.
        digest: hash of what `CutSegment.sha256` says.
    """

    def __init__(self, container: Any, video: Any, sounds: list[Any], segment: Segment) -> None:
        self._container, self._video, self._sounds, self._segment = container, video, sounds, segment
        self._begin, self._end = segment.ticks(video.start_time or 0, video.time_base)
        self._latest = segment.latest_key(video.start_time or 0, video.time_base)
        self.shift = self.first = self.last = 0
        self._found, self.whole = False, True
        self.digest = hashlib.sha256()

    @property
    def shift_s(self) -> Fraction:
        """See above."""
        return self.shift * self._video.time_base

    def packets(self) -> Iterator[Any]:
        """Yield all of them, in file order.

        Raises:
            SampleError: "segment" where there is none, "unstamped" where packets don't tell when they are shown.
        """
        if self._container.format.name in INDEXED:
            self._seek()
        waiting: list[Any] = []  # since the last key frame before the segment; later, what only a later frame may need
        begun = False
        for packet in with_decoding_times(self._container.demux([self._video, *self._sounds])):
            if packet.pts is None or packet.dts is None or self._container.format.name in UNSTAMPED:
                raise SampleError("unstamped", "its container stores no time stamps to cut at; convert it to mp4 first")
            if packet.stream is not self._video:
                # Also before the key frame: a file's sound may lie ahead of the pictures that it belongs to.
                if self._sounds_in(packet):
                    waiting.append(packet)
                continue
            if self._over(packet):
                break
            if packet.is_keyframe and packet.pts <= self._latest and not self._found:
                waiting, begun, self.shift = self._sound_of(waiting), True, packet.pts
            if not begun or packet.pts < self.shift:  # leading pictures, which refer to what lies before the key frame
                continue
            waiting.append(packet)
            if self._shows(packet):
                yield from self._released(waiting)
                waiting = []
        if not self._found:
            raise SampleError(
                "segment", f"no frame is shown from {self._segment}: it lies between two, or behind the end"
            )
        yield from self._sound_of(waiting)
        # Two segments may need the same packets: which of them are shown tells them apart.
        self.digest.update(f"{self.first - self.shift} {self.last - self.shift} {self.shift}".encode())

    def _seek(self) -> None:
        """Seek to a key frame at or before the segment; an index of rounded times may lead to the one after it."""
        # An mp4's sound is sought for itself; Matroska's begins where the pictures do, though it may lie ahead of them.
        first = SKEW_S if self._sounds and self._container.format.name == MATROSKA else 0
        for early in (first, SKEW_S, 10 * SKEW_S, self._segment.start):
            target = max(self._latest - round(early / self._video.time_base), self._video.start_time or 0)
            self._container.seek(target, stream=self._video)
            found = next(self._container.demux(self._video), None)
            if found is not None and found.is_keyframe and found.pts is not None and found.pts <= self._latest:
                break
        self._container.seek(target, stream=self._video)

    def _shows(self, packet: Any) -> bool:
        if packet.is_discard or packet.pts < self._begin or (self._end is not None and packet.pts >= self._end):
            return False
        self.first = min(self.first, packet.pts) if self._found else packet.pts
        self.last = max(self.last, packet.pts) if self._found else packet.pts
        self._found = True
        return True

    def _released(self, waiting: list[Any]) -> Iterator[Any]:
        for packet in waiting:
            if packet.stream is self._video:
                self.digest.update(bytes(packet))
                self.whole &= self._shows(packet)
            yield packet

    def _sound_of(self, packets: list[Any]) -> list[Any]:
        return [packet for packet in packets if packet.stream is not self._video]

    def _sounds_in(self, packet: Any) -> bool:
        time = packet.pts * packet.time_base
        end = None if self._end is None else self._end * self._video.time_base
        return time >= self._begin * self._video.time_base and (end is None or time < end)

    def _over(self, packet: Any) -> bool:
        """Tell whether no frame of the segment comes any more: frames are shown after they are decoded."""
        if self._end is None:
            return False
        late = SKEW_S if self._sounds else 0
        return (packet.dts - self._end) * self._video.time_base >= late
