"""From PyAV's decoded frames to RGB: upright, and of each picture no more than what is asked for."""

from collections.abc import Iterable
from typing import Any

import av
import av.filter
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from pretrain.data.decoders.crops import Box, Boxes, cut, hull
from pretrain.errors import SampleError

#: Filters that turn a frame upright, by the display matrix's rotation in degrees counter-clockwise.
UPRIGHT = {90: ["transpose=cclock"], -90: ["transpose=clock"], 180: ["hflip", "vflip"], -180: ["hflip", "vflip"]}


class RGBConverter:
    """Converter of the frames of one stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        # One converter for all: frame.to_ndarray sets up another for every frame, which takes longer than converting.
        self._converter = VideoReformatter()
        self._graph: av.filter.Graph | None = None
        self._part: av.VideoFrame | None = None
        self._targets: list[npt.NDArray[np.uint8]] = []

    def crops(self, frames: Iterable[av.VideoFrame], count: int, boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        """Convert `count` frames in each box, each written once, into its place: uint8 [count, height, width, 3].

        Raises:
            SampleError: "decode" for damaged frames, frames of two sizes, and rotation by no multiple of 90 degrees.
        """
        clips: list[npt.NDArray[np.uint8]] = []
        for number, frame in enumerate(map(self._upright, frames)):
            if number == 0:
                size = frame.width, frame.height
                chosen = boxes(*size)
                part = _even(hull(chosen), frame)
                inside = [box._replace(x=box.x - part.x, y=box.y - part.y) for box in chosen]
                clips = [np.empty((count, box.height, box.width, 3), dtype=np.uint8) for box in chosen]
            elif size != (frame.width, frame.height):
                raise SampleError("decode", f"{size} and {(frame.width, frame.height)} in one video")
            picture = self._picture(frame, part)
            for clip, box in zip(clips, inside, strict=True):
                clip[number] = cut(picture, box)
        return clips

    def close(self) -> None:
        """Free the filter graph, which refers to the stream."""
        self._graph = None

    def _upright(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Turn before the conversion to RGB, as the other decoders do: chroma is interpolated along other axes."""
        if frame.is_corrupt:
            raise SampleError("decode", f"damaged frame at time stamp {frame.pts}")
        if not frame.rotation % 360:
            return frame
        if frame.rotation not in UPRIGHT:
            raise SampleError("decode", f"rotation by {frame.rotation} degrees is not a multiple of 90")
        if self._graph is None:
            self._graph = av.filter.Graph()
            nodes = [self._graph.add_buffer(template=self._stream)]
            nodes += [self._graph.add(*step.split("=")) for step in UPRIGHT[frame.rotation]]
            nodes += [self._graph.add("buffersink")]
            self._graph.link_nodes(*nodes).configure()
        self._graph.vpush(frame)
        return self._graph.vpull()

    def _picture(self, frame: av.VideoFrame, part: Box) -> npt.NDArray[np.uint8]:
        """Convert a part of a frame to RGB [H, W, 3]."""
        if _may_be_cut_first(frame):
            return self._rgb(self._cut(frame, part))
        return cut(self._rgb(frame), part)

    def _rgb(self, frame: av.VideoFrame) -> npt.NDArray[np.uint8]:
        # One thread: by default FFmpeg would start as many as there are processors, for each video.
        plane = self._converter.reformat(frame, format="rgb24", threads=1).planes[0]
        return _pixels(plane)[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)

    def _cut(self, frame: av.VideoFrame, box: Box) -> av.VideoFrame:
        """Cut a box of even corners out of a yuv420p frame; valid until the next call."""
        if self._part is None or (self._part.width, self._part.height) != (box.width, box.height):
            self._part = av.VideoFrame(box.width, box.height, "yuv420p")
            self._targets = [_pixels(plane)[:, : plane.width] for plane in self._part.planes]
        for number, (plane, target) in enumerate(zip(frame.planes, self._targets, strict=True)):
            x, y = (box.x, box.y) if number == 0 else (box.x // 2, box.y // 2)
            height, width = target.shape
            target[:] = _pixels(plane)[y : y + height, x : x + width]
        # Left out, FFmpeg would convert by a matrix and range that need not be the frame's.
        self._part.colorspace, self._part.color_range = frame.colorspace, frame.color_range
        return self._part


def _may_be_cut_first(frame: av.VideoFrame) -> bool:
    """Tell whether FFmpeg converts each block of 2 x 2 pixels by itself, so that cutting first changes no bit.

    It interpolates chroma over rows where the height is odd, and takes interlaced frames field by field. Frames that a
    filter turned may count their rows upwards, with planes that begin at their end.
    """
    return (
        frame.format.name == "yuv420p"
        and frame.height % 2 == 0
        and not frame.interlaced_frame
        and frame.planes[0].line_size > 0
    )


def _even(box: Box, frame: av.VideoFrame) -> Box:
    """Widen a box to whole blocks of 2 x 2 pixels, but not over the right edge of a frame of odd width."""
    x, y = box.x - box.x % 2, box.y - box.y % 2
    right, bottom = box.x + box.width, box.y + box.height
    return Box(x, y, min(right + right % 2, frame.width) - x, bottom + bottom % 2 - y)


def _pixels(plane: Any) -> npt.NDArray[np.uint8]:
    """View the bytes of a plane, [rows, bytes a row with padding], without copying."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
