"""PyAV (current FFmpeg in the wheel): the default; every codec, exact by time stamps.

The packets are read first, without decoding: their time stamps sorted, the i-th belongs to frame i. A frame is reached
from the last key frame before it, or by decoding on if that is nearer. Frames in between that no other frame refers to
(H.264's non-reference pictures: most B frames) never reach the decoder, unless they are asked for.
"""

import bisect
import io
from collections.abc import Iterable, Iterator

import av
import numpy as np
import numpy.typing as npt

from pretrain.data.boxes import Boxes
from pretrain.data.decoders import VideoReader
from pretrain.data.decoders.nal_units import is_reference, length_bytes
from pretrain.data.decoders.rgb import RGBConverter
from pretrain.errors import SampleError

FFmpegError = av.error.FFmpegError

#: Containers that store no presentation time stamps.
UNSTAMPED = ("avi", "h264", "hevc", "m4v")


class PyAVReader(VideoReader):
    """Reads with av.open from memory.

    Attributes:
        decoded: Packets that reached the decoder so far.
    """

    def __init__(self, data: bytes) -> None:
        self.decoded = 0
        try:
            self._container = av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
        except (FFmpegError, ValueError) as error:
            raise SampleError("open", str(error)) from error
        if not self._container.streams.video:
            self._container.close()
            raise SampleError("open", "no video stream")
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:
            self._container.close()
            raise SampleError("decode", "FFmpeg has no decoder for its codec")
        self._stream.thread_type = "NONE"
        try:
            self._scan()
        except FFmpegError as error:
            self._container.close()
            raise SampleError("decode", str(error)) from error
        self.fps = float(self._stream.average_rate or 0)
        self._rgb = RGBConverter(self._stream)

    def _scan(self) -> None:
        """List all packets: time stamps of frames, and where decoding can start."""
        packets = [packet for packet in self._container.demux(self._stream) if packet.size]
        if any(packet.is_corrupt for packet in packets):
            raise SampleError("decode", "the file is cut or damaged (a packet is marked as corrupt)")
        # What an edit list leaves out is decoded, since other frames may depend on it, and not shown.
        shown = [packet for packet in packets if not packet.is_discard]
        self.num_frames = len(shown)
        places = {packet.pts: place for place, packet in enumerate(packets) if packet.pts is not None}
        # Without presentation time stamps (AVI stores none and FFmpeg's guess is wrong with B frames) frames can
        # only be counted, from the beginning.
        exact = len(places) == len(packets) and self._container.format.name not in UNSTAMPED
        stamps = sorted(packet.pts for packet in shown if packet.pts is not None)
        self._stamps: list[int] | None = stamps if exact else None
        self._places: dict[int, int] = places
        self._packets = packets
        self._keys = sorted(pts for pts, place in places.items() if packets[place].is_keyframe)
        context = self._stream.codec_context
        self._length_bytes = length_bytes(context.extradata or b"") if context.name == "h264" else None

    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        try:
            frames = self._counted(wanted) if self._stamps is None else self._by_stamp(wanted, self._stamps)
            return self._rgb.crops(frames, len(wanted), boxes)
        except FFmpegError as error:
            raise SampleError("decode", str(error)) from error

    def _by_stamp(self, wanted: list[int], stamps: list[int]) -> list[av.VideoFrame]:
        asked = {stamps[index]: index for index in wanted}
        found = self._delivered(asked, [self._from_key(stamp) for stamp in asked])
        lost = [stamp for stamp in asked if stamp not in found]
        if lost:
            # Some containers mark frames as keys that need what came before them.
            found |= self._delivered(lost, [range(self._places[stamp] + 1) for stamp in lost])
        for stamp, index in asked.items():
            if stamp not in found:
                raise SampleError("decode", f"frame {index} of {self.num_frames} was not delivered")
        return [found[stamp] for stamp in asked]

    def _from_key(self, stamp: int) -> range:
        """Places, in decoding order, of the packets from the key frame at or before a frame to that frame."""
        before = bisect.bisect_right(self._keys, stamp)
        first = self._places[self._keys[before - 1]] if before else 0
        place = self._places[stamp]
        return range(first if first <= place else 0, place + 1)

    def _delivered(self, asked: Iterable[int], spans: list[range]) -> dict[int, av.VideoFrame]:
        """Decode the packets of all spans once, without those that nothing asked for depends on; frames by time stamp.

        A span that does not continue the one before it starts a decoder of empty memory.
        """
        stamps = set(asked)
        found: dict[int, av.VideoFrame] = {}
        end = 0
        for place in sorted({place for span in spans for place in span}):
            if place > end:
                found |= self._drain(stamps)
            end = place + 1
            packet = self._packets[place]
            if packet.pts in stamps or is_reference(packet, self._length_bytes):
                self.decoded += 1
                found |= _of(packet.decode(), stamps)
        return found | self._drain(stamps)

    def _drain(self, stamps: set[int]) -> dict[int, av.VideoFrame]:
        """What the decoder still holds back; it is as new afterwards."""
        context = self._stream.codec_context
        rest = _of(context.decode(None), stamps) if context.is_open else {}
        if context.is_open:
            context.flush_buffers()
        return rest

    def _counted(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        frames = self._from_beginning()
        number = -1
        for index in wanted:
            for frame in frames:
                number += 1
                if number == index:
                    yield frame
                    break
            else:
                raise SampleError("decode", f"frame {index} of {self.num_frames} was not delivered")

    def _from_beginning(self) -> Iterator[av.VideoFrame]:
        self._container.seek(min(self._stream.start_time or 0, 0), stream=self._stream, backward=True)
        return self._container.decode(self._stream)

    def close(self) -> None:
        """Close the container."""
        self._rgb.close()
        self._packets = []
        self._container.close()


def _of(frames: list[av.VideoFrame], stamps: set[int]) -> dict[int, av.VideoFrame]:
    return {frame.pts: frame for frame in frames if frame.pts in stamps}


def open_reader(data: bytes) -> VideoReader:
    """Open a video in memory."""
    return PyAVReader(data)
