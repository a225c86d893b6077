"""PyAV (current FFmpeg in the wheel): every codec, exact by time stamps.

The packets' time stamps are read first, without decoding: sorted, the i-th belongs to frame i. A frame is reached from
the last key frame before it, or by decoding on if that is nearer.
"""

import bisect
import io
from collections.abc import Iterator

import av
import av.filter
import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import VideoReader
from pretrain.errors import SampleError

FFmpegError = av.error.FFmpegError

#: Containers that store no presentation time stamps.
UNSTAMPED = ("avi", "h264", "hevc", "m4v")

#: Filters that turn a frame upright, by the display matrix's rotation in degrees counter-clockwise.
UPRIGHT = {90: ["transpose=cclock"], -90: ["transpose=clock"], 180: ["hflip", "vflip"], -180: ["hflip", "vflip"]}


class PyAVReader(VideoReader):
    """Reads with av.open from memory."""

    def __init__(self, data: bytes) -> None:
        try:
            self._container = av.open(io.BytesIO(data), mode="r", metadata_errors="ignore")
        except (FFmpegError, ValueError) as error:
            raise SampleError("open", str(error)) from error
        if not self._container.streams.video:
            self._container.close()
            raise SampleError("open", "no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "NONE"
        try:
            self._scan()
        except FFmpegError as error:
            self._container.close()
            raise SampleError("decode", str(error)) from error
        self.fps = float(self._stream.average_rate or 0)
        self._upright: av.filter.Graph | None = None

    def _scan(self) -> None:
        """List all packets: time stamps of frames, and where decoding can start."""
        packets = [packet for packet in self._container.demux(self._stream) if packet.size and not packet.is_discard]
        if any(packet.is_corrupt for packet in packets):
            raise SampleError("decode", "the file is cut or damaged (a packet is marked as corrupt)")
        self.num_frames = len(packets)
        stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
        exact = len(stamps) == len(packets) and len(set(stamps)) == len(stamps)
        # Without presentation time stamps (AVI stores none and FFmpeg's guess is wrong with B frames) frames can
        # only be counted, from the beginning.
        exact = exact and self._container.format.name not in UNSTAMPED
        self._stamps: list[int] | None = stamps if exact else None
        keys = [(packet.pts, packet.dts) for packet in packets if packet.is_keyframe]
        self._keys = sorted((pts, pts if dts is None else dts) for pts, dts in keys if pts is not None)

    def _decode(self, wanted: list[int]) -> npt.NDArray[np.uint8]:
        try:
            frames = self._counted(wanted) if self._stamps is None else self._by_stamp(wanted, self._stamps)
            return np.stack([self._array(frame) for frame in frames])
        except FFmpegError as error:
            raise SampleError("decode", str(error)) from error

    def _by_stamp(self, wanted: list[int], stamps: list[int]) -> Iterator[av.VideoFrame]:
        decoding: Iterator[av.VideoFrame] = iter(())
        reached: int | None = None
        for index in wanted:
            stamp = stamps[index]
            starts = self._starts(stamp)
            frame = None
            if reached is not None and (starts[0] is None or reached >= starts[0]):
                frame = _frame_at(decoding, stamp)
            while frame is None and starts:
                decoding = self._from(starts.pop(0))
                frame = _frame_at(decoding, stamp)
            if frame is None:
                raise SampleError("decode", f"frame {index} of {self.num_frames} was not delivered")
            reached = stamp
            yield frame

    def _starts(self, stamp: int) -> list[int | None]:
        """Where to start decoding for a frame: the key frame before it, and what to try where a container's seek
        lands behind that (some go by decoding time): its decoding time, then the beginning."""
        place = bisect.bisect_right(self._keys, stamp, key=lambda key: key[0]) - 1
        return [*self._keys[place], None] if place >= 0 else [None]

    def _counted(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        frames = self._from(None)
        number = -1
        for index in wanted:
            for frame in frames:
                number += 1
                if number == index:
                    yield frame
                    break
            else:
                raise SampleError("decode", f"frame {index} of {self.num_frames} was not delivered")

    def _from(self, start: int | None) -> Iterator[av.VideoFrame]:
        """Frames from the key frame at or before time stamp `start` on; None: from the beginning."""
        first = start if start is not None else min(self._stream.start_time or 0, 0)
        self._container.seek(first, stream=self._stream, backward=True)
        return self._container.decode(self._stream)

    def _array(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        if frame.is_corrupt:
            raise SampleError("decode", f"damaged frame at time stamp {frame.pts}")
        if frame.rotation % 360:
            frame = self._turned(frame)
        return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)

    def _turned(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Turn before the conversion to RGB, as the other decoders do: chroma is interpolated along other axes."""
        if frame.rotation not in UPRIGHT:
            raise SampleError("decode", f"rotation by {frame.rotation} degrees is not a multiple of 90")
        if self._upright is None:
            self._upright = av.filter.Graph()
            nodes = [self._upright.add_buffer(template=self._stream)]
            nodes += [self._upright.add(*step.split("=")) for step in UPRIGHT[frame.rotation]]
            nodes += [self._upright.add("buffersink")]
            self._upright.link_nodes(*nodes).configure()
        self._upright.vpush(frame)
        return self._upright.vpull()

    def close(self) -> None:
        """Close the container."""
        self._upright = None
        self._container.close()


def _frame_at(decoding: Iterator[av.VideoFrame], stamp: int) -> av.VideoFrame | None:
    """Decode on to the frame with a time stamp; None if decoding began behind it or the frame is missing."""
    frame = next((frame for frame in decoding if frame.pts is not None and frame.pts >= stamp), None)
    return frame if frame is not None and frame.pts == stamp else None


def open_reader(data: bytes) -> VideoReader:
    """Open a video in memory."""
    return PyAVReader(data)
