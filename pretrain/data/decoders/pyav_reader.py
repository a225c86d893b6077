"""PyAV (current FFmpeg in the wheel): the default; every codec, exact by time stamps.

The packets are read first, without decoding: their time stamps sorted, the i-th belongs to frame i. A frame is reached
from the last key frame before it, or by decoding on if that is nearer. Frames in between that no other frame refers to
(H.264's non-reference pictures: most B frames) never reach the decoder, unless they are asked for.

Of a video whose packer promises evenly spaced frames only the packets around the asked frames are read. The promise is
held against the file's header and against every packet that is read; where it fails, all packets are read after all.
"""

import bisect
import contextlib
import functools
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import VideoReader
from pretrain.data.decoders.crops import Boxes, whole
from pretrain.data.decoders.nal_units import is_reference, length_bytes
from pretrain.data.decoders.rgb import RGBConverter
from pretrain.data.decoders.streams import main_film
from pretrain.data.linked_video import UNSTAMPED
from pretrain.errors import SampleError

FFmpegError = av.error.FFmpegError

#: FFmpeg opens a file by decoding its first frame, to find what a header may lack: a tenth of a clip's time. The header
#: of an mp4 lacks nothing that is needed here. Without a codec to try, that step ends at once; later ones don't ask.
UNTRIED = {"codec_whitelist": "none"}

logger = logging.getLogger(__name__)


class PyAVReader(VideoReader):
    """Reader by av.open from memory.

    Args:
        data: The whole file.
        stamps: The frames' time stamps as its packer promises them; None where it does not.

    Attributes:
        decoded: Packets that reached the decoder so far.
        stamps: Time stamps of the frames, in the stream's time base; None where the container stores none. A range as
            long as the packer's promise holds.
    """

    def __init__(self, data: bytes, stamps: range | None = None) -> None:
        self.decoded = 0
        self._data = data
        self._packets: list[av.Packet] = []
        self._opened = contextlib.ExitStack()
        try:
            if stamps is None or not self._trusts(stamps):
                self._scan()
        except BaseException:
            self.close()
            raise
        self.fps = float(self._stream.average_rate or 0)

    def times(self) -> npt.NDArray[np.float64]:
        """Return times by time stamps; by the mean rate where the container stores none."""
        if self.stamps is None:
            return np.arange(self.num_frames) / (self.fps or 1.0)
        stamps = np.array(self.stamps, dtype=np.int64)
        return (stamps - stamps[0]) * float(self._stream.time_base or 1)

    def _file(self) -> Any:
        """Return the file, at its beginning."""
        return io.BytesIO(self._data)

    def _open(self, options: dict[str, str]) -> None:
        try:
            # A title in another encoding must not cost the video.
            self._container = av.open(self._file(), mode="r", metadata_errors="ignore", options=options)
        except (FFmpegError, ValueError) as error:
            raise SampleError("open", str(error)) from error
        self._opened.callback(self._container.close)
        # A cover picture is a video of one frame where there is no other, as before.
        stream = main_film(self._container) or next(iter(self._container.streams.video), None)
        if stream is None:
            raise SampleError("open", "no video stream")
        self._stream = stream
        context = self._stream.codec_context
        if context is None:
            raise SampleError("decode", "FFmpeg has no decoder for its codec")
        # Workers are the parallelism: threads here would only compete with theirs.
        self._stream.thread_type = "NONE"
        self._length_bytes = length_bytes(context.extradata or b"") if context.name == "h264" else None
        self._rgb = RGBConverter(self._stream)
        self._opened.callback(self._rgb.close)

    def _trusts(self, stamps: range) -> bool:
        """Open without listing the packets, if the header agrees with what is promised."""
        try:
            self._open(UNTRIED)
        except SampleError:
            self.close()
            return False
        # A cut or replaced file has another header. What it bears out is believed until a packet says otherwise.
        found = self._stream.start_time, self._stream.frames, self._stream.duration
        if found != (stamps.start, len(stamps), len(stamps) * stamps.step):
            self.close()
            return False
        self.num_frames = len(stamps)
        self.stamps: Sequence[int] | None = stamps
        return True

    def _scan(self) -> None:
        """Open and list all packets: time stamps of frames, and where decoding can start."""
        self._open({})
        try:
            packets = [packet for packet in self._container.demux(self._stream) if packet.size]
        except FFmpegError as error:
            raise SampleError("decode", str(error)) from error
        if any(packet.is_corrupt for packet in packets):
            raise SampleError("decode", "the file is cut or damaged (a packet is marked as corrupt)")
        # What an edit list leaves out is decoded, since other frames may depend on it, and not shown.
        shown = [packet for packet in packets if not packet.is_discard]
        self.num_frames = len(shown)
        # Without presentation time stamps (AVI stores none and FFmpeg's guess is wrong with B frames) frames can
        # only be counted, from the beginning.
        exact = self._index(packets) and self._container.format.name not in UNSTAMPED
        stamps = sorted(packet.pts for packet in shown if packet.pts is not None)
        self.stamps = stamps if exact else None

    def _window(self, stamps: range, wanted: list[int]) -> None:
        """List the packets from the key frame before the first wanted frame to the last wanted one.

        Raises:
            SampleError: a packet is not what the packer promised.
            FFmpegError: the file can't be read.
        """
        first, missing = stamps[wanted[0]], {stamps[index] for index in wanted}
        self._container.seek(first, stream=self._stream)
        packets: list[av.Packet] = []
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt or packet.is_discard or packet.pts not in stamps:
                break
            packets.append(packet)
            missing.discard(packet.pts)
            if not missing:
                break
        begins = packets[:1] and packets[0].is_keyframe and (packets[0].pts or 0) <= first
        if missing or not begins or not self._index(packets):
            raise SampleError("decode", "time stamps are not those that the packer promised")

    def _index(self, packets: list[av.Packet]) -> bool:
        """Keep packets, in decoding order, with what finds them by time stamp; tell whether that finds each of them."""
        places = {packet.pts: place for place, packet in enumerate(packets) if packet.pts is not None}
        self._places: dict[int, int] = places
        self._packets = packets
        self._keys = sorted(pts for pts, place in places.items() if packets[place].is_keyframe)
        return len(places) == len(packets)

    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        try:
            if isinstance(self.stamps, range):
                try:
                    self._window(self.stamps, wanted)
                    return self._crops(wanted, boxes)
                except (SampleError, FFmpegError) as error:
                    self._distrust(error, wanted)
            return self._crops(wanted, boxes)
        except FFmpegError as error:
            raise SampleError("decode", str(error)) from error

    def _distrust(self, error: Exception, wanted: list[int]) -> None:
        """Do without the packer's promise: what is wrong, and whether anything is, the whole file tells."""
        logger.info("reading all packets of a video, since reading some of them failed: %s", error)
        self.close()
        self._scan()
        if wanted[-1] >= self.num_frames:
            raise SampleError("too_short", f"frame {wanted[-1]} asked of a video of {self.num_frames}")

    def _crops(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        frames = self._counted(wanted) if self.stamps is None else self._by_stamp(wanted, self.stamps)
        return self._rgb.crops(frames, len(wanted), boxes)

    def _by_stamp(self, wanted: list[int], stamps: Sequence[int]) -> list[av.VideoFrame]:
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
        """List, in decoding order, the places of packets from the key frame at or before a frame to that frame."""
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
        """Take what the decoder still holds back; it is as new afterwards."""
        context = self._stream.codec_context
        rest = _of(context.decode(None), stamps) if context.is_open else {}
        if context.is_open:
            context.flush_buffers()
        return rest

    def in_turn(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Decode all frames once without going back to a key frame; see VideoReader."""
        count = 0
        try:
            for frame in self._from_beginning():
                # An edit list leaves out frames that are decoded all the same.
                if self.stamps is None or frame.pts in self.stamps:
                    yield self._rgb.crops([frame], 1, whole)[0][0]
                    count += 1
        except FFmpegError as error:
            raise SampleError("decode", str(error)) from error
        finally:
            # At its end the decoder takes no more packets until it is flushed.
            if self._stream.codec_context.is_open:
                self._stream.codec_context.flush_buffers()
        if count != self.num_frames:
            raise SampleError("decode", f"{count} frames of {self.num_frames} were delivered")

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
        self._packets = []
        self._opened.close()


def _of(frames: list[av.VideoFrame], stamps: set[int]) -> dict[int, av.VideoFrame]:
    return {frame.pts: frame for frame in frames if frame.pts in stamps}


class UntimedReader(VideoReader):
    """Reader by a library that tells no exact times of frames that it has not decoded; PyAV lists them, once."""

    def __init__(self, data: bytes, stamps: range | None) -> None:
        self._data, self._stamps = data, stamps

    def times(self) -> npt.NDArray[np.float64]:
        """Return times by time stamps; "decode" also where the library sees another number of frames."""
        return self._times

    @functools.cached_property
    def _times(self) -> npt.NDArray[np.float64]:
        with PyAVReader(self._data, self._stamps) as reader:
            times = reader.times()
        if len(times) != self.num_frames:
            raise SampleError("decode", f"{self.num_frames} frames, and {len(times)} time stamps")
        return times


def open_reader(data: bytes, stamps: range | None) -> VideoReader:
    """Open a video in memory; its packer may promise the frames' time stamps."""
    return PyAVReader(data, stamps)
