"""Small real videos with their frame number in the pixels, and fixtures that make and read them."""

import functools
import io
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
import pytest

BITS = 8


def _frame(number: int, width: int, height: int, colour: int) -> np.ndarray:
    """Upper half: the number in binary, bright = 1; lower half: a gradient, tinted."""
    pixels = np.full((height, width, 3), 40, dtype=np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            pixels[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 220
    pixels[height // 2 :] = np.linspace(0, 255, width).astype(np.uint8)[None, :, None]
    pixels[height // 2 :, :, 1] = colour % 256
    return pixels


@functools.lru_cache(maxsize=256)
def encoded_video(
    frames: int = 24,
    width: int = 64,
    height: int = 48,
    gop: int = 8,
    b_frames: int = 2,
    variable: bool = False,
    container: str = "mp4",
    pixel_format: str = "yuv420p",
    colour: int = 0,
) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": "18", "sc_threshold": "0", "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.gop_size, stream.max_b_frames = gop, b_frames
        stamp = 0
        if variable:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(_frame(number, width, height, colour), format="rgb24")
            frame.pts = stamp
            if variable:
                frame.time_base = Fraction(1, 1000)
            stamp += (20, 40, 130)[number % 3] if variable else 1
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Makes an h264 video whose frames carry their number."""
    return encoded_video


@pytest.fixture(scope="session")
def frame_number() -> Callable[[np.ndarray], int]:
    """Reads the number that a frame, uint8 [H, W, 3], carries."""

    def read(frame: np.ndarray) -> int:
        height, width = frame.shape[:2]
        row = frame[height // 4]
        return sum(1 << bit for bit in range(BITS) if row[int((bit + 0.5) * width / BITS)].mean() > 130)

    return read
