"""decord (FFmpeg 4.1), which published code uses: no AV1, inexact on some AVI and MPEG-PS files, unmaintained."""

import contextlib
import io
import os

# How often decord asks its decoding thread for a frame before it gives up. The default of 10240 looks like a hang on
# some broken files; 128 fails on sound ones whenever the thread is slow (bikes.mp4, frame 0, on a busy machine).
os.environ.setdefault("DECORD_EOF_RETRY_MAX", "4096")

import decord
import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import VideoReader, cut_all
from pretrain.data.decoders.crops import Boxes
from pretrain.data.decoders.pyav_reader import UntimedReader
from pretrain.errors import SampleError

decord.logging.set_level(decord.logging.FATAL)


class DecordReader(UntimedReader):
    """Reader by decord.VideoReader, whose own times are rounded to float32: a frame's length after some hours."""

    def __init__(self, data: bytes, stamps: range | None = None) -> None:
        super().__init__(data, stamps)
        if _without_index(data):
            raise SampleError("open", "an AVI file without its index, which kills decord where the file is cut")
        try:
            # fault_tol=0: an error instead of a neighbouring frame that silently stands for a damaged one.
            self._reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1, fault_tol=0)
        except (decord.DECORDError, RuntimeError, AssertionError) as error:
            raise SampleError("open", _first_words(error)) from error
        self.num_frames = len(self._reader)
        starts = self._reader.get_frame_timestamp(range(self.num_frames))[:, 0]
        # decord finds a frame by its time: of two with one time it gives either, as its decoding thread happens to run.
        # Before 0: an AVI file, which keeps no times; there decord counts.
        if ((starts[1:] <= starts[:-1]) & (starts[:-1] >= 0)).any():
            raise SampleError("open", "frames that share a time, which decord mixes up; input.decoder=pyav counts them")
        self.fps = float(self._reader.get_avg_fps())

    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        try:
            frames: npt.NDArray[np.uint8] = self._reader.get_batch(wanted).asnumpy()
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
            raise SampleError("decode", _first_words(error)) from error
        return cut_all(frames, boxes)

    def close(self) -> None:
        """Rewind, which stops decoding in the background (decord #208: memory grows otherwise), and free."""
        reader, self._reader = self._reader, None
        if reader is not None:
            # A file that can't be read from its beginning has nothing that could go on decoding.
            with contextlib.suppress(RuntimeError, decord.DECORDError):
                reader.seek(0)


def _without_index(data: bytes) -> bool:
    """Tell whether this is an AVI file that has lost its index; a RIFF file may have two kinds."""
    return data[:4] == b"RIFF" and data[8:12] == b"AVI " and data.rfind(b"idx1") < 0 and data.find(b"indx") < 0


def _first_words(error: Exception) -> str:
    """Strip decord's message of its source path, time and C++ stack."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit(".cc:", 1)[-1][:200]


def open_reader(data: bytes, stamps: range | None) -> VideoReader:
    """Open a video in memory; makes its own list of frames, so that what is promised serves for their times only."""
    return DecordReader(data, stamps)
