"""Decoding behind one small interface: the same frames for the same indices, whichever library decodes.

Index i is the i-th frame in presentation order, whatever its time stamp (variable frame rate included), upright
(rotation metadata applied). One reader serves one sample, decodes with one thread (workers are the parallelism) and
only what the asked frames need: from the key frame before them.
"""

import abc
import importlib
import importlib.util
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.crops import Boxes, cut, whole
from pretrain.data.linked_video import Footage, LinkedVideo, StillImage, tell_whole
from pretrain.data.time_segment import ROUNDING_S, Segment
from pretrain.errors import DataError, RecipeError, SampleError

Decoder = Literal["decord", "pyav", "torchcodec", "torchcodec_cuda"]

#: Module that tells whether each decoder is installed, and how to get it.
DECODERS: dict[str, tuple[str, str]] = {
    "decord": ("decord", "pip install decord (Linux x86-64 only), or set input.decoder=pyav"),
    "pyav": ("av", "pip install av"),
    "torchcodec": (
        "torchcodec",
        "pip install 'tubelet[torchcodec]' and FFmpeg's shared libraries (apt-get install ffmpeg), or set "
        "input.decoder=pyav",
    ),
    "torchcodec_cuda": (
        "torchcodec",
        "it needs a GPU with NVDEC, its driver's libnvcuvid (in containers NVIDIA_DRIVER_CAPABILITIES=compute,video), "
        "and torch and the extra tubelet[torchcodec] both built for CUDA (https://download.pytorch.org/whl/cuXXX); or "
        "set input.decoder=pyav",
    ),
}


#: Frames that a reader decodes together where it is asked for all of them.
AT_ONCE = 32


def why_missing(decoder: str) -> str:
    """Say why one of `DECODERS` can't work here, as far as that shows without loading it; empty: nothing is known."""
    module, hint = DECODERS[decoder]
    # Not imported: torchcodec needs FFmpeg's libraries, and a recipe may be checked where nothing is decoded.
    if importlib.util.find_spec(module) is None:
        return f"{decoder} is not installed here; {hint}"
    if decoder == "torchcodec_cuda":
        import torch

        if torch.version.cuda is None:
            return f"{decoder} can't work with torch {torch.__version__}, which is built without CUDA; {hint}"
    return ""


class VideoReader(abc.ABC):
    """An opened video. Close it, or use it as a context manager: readers that stay alive are what leaks memory.

    Attributes:
        num_frames: Frames of the video.
        fps: Mean frames per second.
    """

    num_frames: int
    fps: float

    def frames(self, indices: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Decode some frames, in the order asked for, repetitions allowed.

        Args:
            indices: Frame numbers in presentation order, one-dimensional, each in [0, num_frames).

        Returns:
            RGB, uint8 [len(indices), H, W, 3].

        Raises:
            SampleError: "too_short" for an index beyond the end, "decode" for damaged data.
        """
        return self.crops(indices, whole)[0]

    def crops(self, indices: npt.ArrayLike, boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        """Decode some frames and cut boxes out of them: decoders that can make less of a picture than all of it do.

        Args:
            indices: As for `frames`.
            boxes: Called once with width and height of the upright frames.

        Returns:
            RGB of each box, uint8 [len(indices), box.height, box.width, 3].

        Raises:
            SampleError: as by `frames`.
        """
        # Each frame once: a clip of a short video repeats its last one, for which a decoder would go back again.
        wanted, inverse = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= self.num_frames:
            raise SampleError("too_short", f"frames {wanted[0]}..{wanted[-1]} asked of a video of {self.num_frames}")
        decoded = self._decode(wanted.tolist(), boxes)
        for clip in decoded:
            if clip.shape[0] != len(wanted) or clip.ndim != 4 or clip.shape[3] != 3:
                raise SampleError("decode", f"{len(wanted)} RGB frames asked, an array {clip.shape} delivered")
        # Nearly all clips are; indexing would copy every pixel of theirs.
        as_asked = len(wanted) == len(inverse) and _sorted(inverse)
        return decoded if as_asked else [clip[inverse] for clip in decoded]

    def in_turn(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Decode all frames once, from the first to the last: RGB, uint8 [H, W, 3] each, and few of them in memory.

        Raises:
            SampleError: "decode" for damaged data.
        """
        for first in range(0, self.num_frames, AT_ONCE):
            yield from self.frames(np.arange(first, min(first + AT_ONCE, self.num_frames)))

    @abc.abstractmethod
    def times(self) -> npt.NDArray[np.float64]:
        """Return the seconds from the first frame to each, float64 [num_frames], variable frame rates included.

        Raises:
            SampleError: "decode" where frames and time stamps don't agree.
        """

    @property
    def duration(self) -> float:
        """Seconds that the video is shown, its last frame for as long as frames are on average."""
        return float(self.times()[-1]) + 1 / (self.fps or 1.0)

    def indices_at(self, seconds: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Find the numbers of the frames that are shown at some times: int64, of the same shape.

        Args:
            seconds: Since the first frame; before it the first frame is meant, after the end the last.

        Raises:
            SampleError: as by `times`.
        """
        # Half a millisecond later: times that were rounded down would mean the frame before.
        after = np.searchsorted(self.times(), np.asarray(seconds, dtype=np.float64) + ROUNDING_S, side="right")
        return np.clip(after - 1, 0, self.num_frames - 1).astype(np.int64)

    @abc.abstractmethod
    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        """Decode frames with increasing, different numbers; for each box uint8 [len(wanted), height, width, 3]."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the decoder; the reader can't be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PartReader(VideoReader):
    """The frames of another reader that lie in a segment.

    Raises:
        SampleError: "segment" where there are none.
    """

    def __init__(self, reader: VideoReader, segment: Segment) -> None:
        self._reader, self.fps = reader, reader.fps
        try:
            self._times = reader.times()
        except SampleError:
            reader.close()
            raise
        end = np.inf if segment.end is None else segment.end
        bounds = np.searchsorted(self._times, np.array([segment.start, end]) - ROUNDING_S)
        self._first, self.num_frames = int(bounds[0]), int(bounds[1] - bounds[0])
        if not self.num_frames:
            reader.close()
            raise SampleError("segment", f"no frame is shown from {segment}")

    def times(self) -> npt.NDArray[np.float64]:
        """Return the times from the segment's first frame on."""
        part = self._times[self._first : self._first + self.num_frames]
        return part - part[0]

    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        return self._reader._decode([self._first + index for index in wanted], boxes)

    def close(self) -> None:
        """Close the other reader."""
        self._reader.close()


def open_video(data: Footage, decoder: str = "decord", stamps: range | None = None) -> VideoReader:
    """Open a video that lies in memory, one that is linked, or an image, which is a video of one frame.

    Args:
        data: The whole file; or a linked one, of which PyAV reads what it needs, and other decoders all.
        decoder: one of `DECODERS`.
        stamps: Time stamps of all frames as the packer promises them, in the stream's time base: spares PyAV reading
            the whole file. Frames are the same with and without, and where the promise is wrong.

    Raises:
        SampleError: "empty" without data or frames, "open" for something that is no video, "decode" for damage.
        RecipeError: no such decoder.
        DataError: the decoder is not installed.
    """
    if isinstance(data, StillImage):
        from pretrain.data.decoders.image import ImageReader

        return ImageReader(data.content)
    if decoder not in DECODERS:
        raise RecipeError(f"input.decoder={decoder!r}: allowed are {', '.join(DECODERS)}")
    try:
        module = importlib.import_module(f"{__name__}.{decoder}_reader")
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec raises RuntimeError where FFmpeg's libraries can't be loaded.
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"input.decoder={decoder}: can't be imported ({reason}); {DECODERS[decoder][1]}") from error
    if isinstance(data, bytes) and not data:
        raise SampleError("empty", "no bytes")
    reader = _open_linked(module, decoder, data) if isinstance(data, LinkedVideo) else module.open_reader(data, stamps)
    if reader.num_frames < 1:
        reader.close()
        raise SampleError("empty", "a video without frames")
    return reader


def _open_linked(module: Any, decoder: str, video: LinkedVideo) -> VideoReader:
    if decoder == "pyav":
        from pretrain.data.decoders.linked_reader import LinkedReader

        return LinkedReader(video)
    tell_whole(video.url, f"input.decoder={decoder} reads from memory only")
    reader: VideoReader = module.open_reader(video.whole(), video.span.stamps)
    return reader if video.span.segment is None else PartReader(reader, video.span.segment)


def _sorted(inverse: npt.NDArray[np.int64]) -> bool:
    return bool((np.diff(inverse) > 0).all())


def cut_all(frames: npt.NDArray[np.uint8], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
    """Cut boxes out of whole frames, uint8 [T, H, W, 3]."""
    return [cut(frames, box) for box in boxes(frames.shape[2], frames.shape[1])]
