"""PyAV on a linked video: a film, or a segment of one, of which only what is asked for is read and kept.

Where the span promises evenly spaced time stamps, a clip costs the container's index and the packets from the key frame
before it on. Else the packets of the segment are listed first, of the whole video where no segment is meant.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import VideoReader
from pretrain.data.decoders.crops import Boxes
from pretrain.data.decoders.pyav_reader import FFmpegError, PyAVReader
from pretrain.data.linked_video import INDEXED, UNSTAMPED, LinkedVideo, tell_whole
from pretrain.data.time_segment import ROUNDING_S
from pretrain.errors import SampleError

#: Wanted frames that are further apart than this, seconds, are read each from its own key frame.
APART_S = 4.0
#: Seconds to seek further back, in turn, where an index of rounded times led to the key frame after the one asked for.
EARLIER_S = (0, 2, 20, 1 << 20)


class LinkedReader(PyAVReader):
    """Reader by av.open and byte ranges.

    Args:
        video: What is read, and what of it is meant.

    Raises:
        SampleError: as by PyAVReader; "segment" where no frame lies in it; "missing" or "changed".
        DataError: the storage does not answer.
    """

    def __init__(self, video: LinkedVideo) -> None:
        self._video = video
        self._first = 0
        self._promised: range | None = None
        try:
            super().__init__(b"", video.span.stamps)
        except SampleError:
            # FFmpeg takes a failed read for the end of the file: without this an outage would become a bad sample.
            video.check()
            raise
        if not self.num_frames and video.span.segment is not None:
            self.close()
            raise SampleError("segment", f"no frame is shown from {video.span.segment}")

    def _file(self) -> Any:
        self._video.seek(0)
        return self._video

    def _open(self, options: dict[str, str]) -> None:
        super()._open(options)
        self._unread = True
        for stream in self._container.streams:
            if stream is not self._stream:
                # The demuxer then leaves out the bytes of sound and subtitles, which would be fetched too.
                stream.discard = av.stream.Discard.all

    def _trusts(self, stamps: range) -> bool:
        if not super()._trusts(stamps):
            self._video.check()
            return False
        self._promised = stamps
        if self._video.span.segment is not None:
            part = self._video.span.segment.of(stamps, Fraction(self._stream.time_base or 1))
            self.stamps, self.num_frames = part, len(part)
        return True

    def _scan(self) -> None:
        """List the time stamps of the frames meant; packets are not kept."""
        self._promised = None
        self._open({})
        segment, base = self._video.span.segment, self._stream.time_base
        first = self._stream.start_time or 0
        begin, end = (None, None) if segment is None else segment.ticks(first, base)
        latest = None if segment is None else segment.latest_key(first, base)
        if not self._seekable:
            tell_whole(self._video.url, f"its container ({self._container.format.name}) has no index")
        elif segment is None:
            tell_whole(self._video.url, "its index lists no frames that are evenly spaced, and no segment is meant")
        stamps = self._listed(latest, end)
        if self._container.format.name in UNSTAMPED:
            self._count(len(stamps))
        elif None in stamps or len(set(stamps)) < len(stamps):
            # Such frames can only be counted, from the file's beginning on: a key frame's number is not known.
            self._count(len(stamps if segment is None else self._listed(None, None)))
        else:
            shown = [s for s in stamps if s is not None and (begin is None or s >= begin) and (end is None or s < end)]
            self.stamps, self.num_frames = sorted(shown), len(shown)

    def _listed(self, latest: int | None, end: int | None) -> list[int | None]:
        """List frames' time stamps in file order, from the key frame at or before `latest` (None: all) until `end`."""
        stamps: list[int | None] = []
        try:
            for packet in self._from(latest):
                # Decoding times never go back, and no frame is shown before it is decoded.
                if end is not None and packet.dts is not None and packet.dts >= end:
                    break
                if packet.is_corrupt:
                    raise SampleError("decode", "the file is cut or damaged (a packet is marked as corrupt)")
                if not packet.is_discard:
                    stamps.append(packet.pts)
        except FFmpegError as error:
            self._video.check()
            raise SampleError("decode", str(error)) from error
        self._video.check()
        return stamps

    def _count(self, frames: int) -> None:
        """Choose the segment's frames by number, at the mean rate, where there are no time stamps."""
        segment, rate = self._video.span.segment, float(self._stream.average_rate or 1)
        times = np.arange(frames) / rate
        bounds = np.array([0, np.inf] if segment is None else [segment.start, segment.end or np.inf])
        first, last = np.searchsorted(times, bounds - ROUNDING_S)
        self.stamps, self._first, self.num_frames = None, int(first), int(last - first)

    @property
    def _seekable(self) -> bool:
        return self._container.format.name in INDEXED

    def _from(self, latest: int | None) -> Iterator[av.Packet]:
        """Demux packets in file order from the last key frame at or before a time stamp on.

        From the file's beginning, if that is None; from a key frame before, if the container can't be sought in.
        """
        unread, self._unread = self._unread, False
        if not self._seekable or latest is None:
            if not unread:
                self.close()
                self._open({})
                self._unread = False
            yield from (packet for packet in self._container.demux(self._stream) if packet.size)
            return
        start = self._stream.start_time or 0
        for earlier in EARLIER_S:
            target = max(latest - round(earlier / self._stream.time_base), start)
            self._container.seek(target, stream=self._stream)
            packets = (packet for packet in self._container.demux(self._stream) if packet.size)
            first = next(packets, None)
            if first is None or (first.is_keyframe and first.pts is not None and first.pts <= latest):
                break
            if target == start:
                break
        if first is None:
            return
        yield first
        yield from packets

    def in_turn(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Decode all frames, some at a time: a segment's lie somewhere in a film; see VideoReader."""
        return VideoReader.in_turn(self)

    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        try:
            try:
                return self._read(wanted, boxes)
            except (SampleError, FFmpegError) as error:
                self._video.check()
                if self._promised is None:
                    raise
                # The promise may be wrong, and not the video: then a read of all packets is only slow.
                self._distrust(error, wanted)
            return self._read(wanted, boxes)
        except (SampleError, FFmpegError) as error:
            self._video.check()
            raise error if isinstance(error, SampleError) else SampleError("decode", str(error)) from error

    def _read(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        if self.stamps is None:
            return self._crops([self._first + index for index in wanted], boxes)
        packets: dict[int, av.Packet] = {}
        for group in self._groups([self.stamps[index] for index in wanted]):
            packets |= self._needed(group)
        self._video.check()
        self._index(list(packets.values()))
        return self._crops(wanted, boxes)

    def _groups(self, stamps: list[int]) -> Iterator[list[int]]:
        """Group time stamps that lie close to each other."""
        apart = APART_S / float(self._stream.time_base or 1)
        group: list[int] = []
        for stamp in stamps:
            if group and stamp - group[-1] > apart and self._seekable:
                yield group
                group = []
            group.append(stamp)
        yield group

    def _needed(self, wanted: list[int]) -> dict[int, av.Packet]:
        """Collect packets by time stamp, in decoding order, from the key frame before the first wanted to the last one.

        Raises:
            SampleError: "decode" where one is not there, or is not what was promised.
        """
        missing = set(wanted)
        packets: dict[int, av.Packet] = {}
        key: int | None = None
        for packet in self._from(wanted[0]):
            stamp = packet.pts
            if stamp is None or packet.is_corrupt:
                break
            if self._promised is not None and (packet.is_discard or stamp not in self._promised):
                break
            # Seeking may have led further back than needed.
            if packet.is_keyframe and stamp <= wanted[0]:
                packets, key = {}, stamp
            packets[stamp] = packet
            missing.discard(stamp)
            if not missing:
                break
        if missing or key is None:
            raise SampleError("decode", "frames are not where the file's index says")
        return packets
