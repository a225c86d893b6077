"""Films whose frames carry their number, 16 bits of it, in bars that survive coding; small videos with 8 bits."""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pretrain.data.decoders import open_video
from pretrain.errors import DataError, SampleError

BITS = 16
#: Of small videos, see `encoded_video`.
SMALL_BITS = 8
WIDTH, HEIGHT = 128, 48


def picture(number: int, seed: int = 0) -> np.ndarray:
    """Grey, as planes of yuv420p. Upper half: the number in binary; lower half: a texture that makes bytes."""
    planes = _background(number % 16, seed).copy()
    for bit in range(BITS):
        if number >> bit & 1:
            planes[: HEIGHT // 2, bit * WIDTH // BITS : (bit + 1) * WIDTH // BITS] = 220
    return planes


@functools.cache
def _background(kind: int, seed: int) -> np.ndarray:
    planes = np.full((HEIGHT * 3 // 2, WIDTH), 40, dtype=np.uint8)
    planes[HEIGHT // 2 : HEIGHT] = np.random.default_rng((seed, kind)).integers(0, 255, (HEIGHT // 2, WIDTH))
    planes[HEIGHT:] = 128
    return planes


def number_of(frame: np.ndarray, bits: int = BITS) -> int:
    """The number that a frame, uint8 [H, W, 3], carries."""
    height, width = frame.shape[:2]
    row = frame[height // 4]
    return sum(1 << bit for bit in range(bits) if row[int((bit + 0.5) * width / bits)].mean() > 130)


def numbers_of(frames: np.ndarray) -> list[int]:
    """Of each of some frames."""
    return [number_of(frame) for frame in frames]


def write_film(
    path: Path,
    frames: int = 250,
    fps: int = 25,
    gop: int = 25,
    b_frames: int = 2,
    times_ms: Sequence[int] | None = None,
    container: str | None = None,
    audio: bool = False,
    front: bool = False,
    codec: str = "libx264",
    seed: int = 0,
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    hidden: int = 0,
) -> Path:
    """A film in the container of the path's ending; an mp4's index lies at its end unless `front`.

    An edit list hides the first `hidden` frames of an mp4, as tools leave it that cut without encoding.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    muxing = {"movflags": "faststart"} if front else muxing or {}
    with av.open(str(path), "w", format=container, options=muxing) as out:
        video = out.add_stream(codec, rate=fps, options={"preset": "ultrafast", "sc_threshold": "0"} | (options or {}))
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.gop_size, video.codec_context.max_b_frames = gop, b_frames
        if times_ms:
            video.codec_context.time_base = video.time_base = Fraction(1, 1000)
        sound = out.add_stream("aac", rate=44100) if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, seed), format="yuv420p")
            frame.pts = times_ms[number] if times_ms else number - hidden
            frame.time_base = Fraction(1, 1000) if times_ms else Fraction(1, fps)
            out.mux(video.encode(frame))
            if sound is not None:
                _add_sound(out, sound, number * 44100 // fps, (number + 1) * 44100 // fps)
        out.mux(video.encode(None))
        if sound is not None:
            out.mux(sound.encode(None))
    return path


def _add_sound(out: Any, stream: Any, begin: int, end: int) -> None:
    noise = np.random.default_rng(begin).normal(0, 0.1, (1, end - begin)).astype("f4")
    frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 44100, begin, Fraction(1, 44100)
    out.mux(stream.encode(frame))


def _small_picture(number: int, width: int, height: int, colour: int) -> np.ndarray:
    """Upper half: the number in binary, bright = 1; lower half: a gradient, tinted."""
    pixels = np.full((height, width, 3), 40, dtype=np.uint8)
    for bit in range(SMALL_BITS):
        if number >> bit & 1:
            pixels[: height // 2, bit * width // SMALL_BITS : (bit + 1) * width // SMALL_BITS] = 220
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
    """A video of some frames in colour, small enough to be decoded a hundred times."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream("libx264", rate=24, options={"crf": "18", "sc_threshold": "0", "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.gop_size, stream.max_b_frames = gop, b_frames
        stamp = 0
        if variable:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(_small_picture(number, width, height, colour), format="rgb24")
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
    """Reads the number that a frame of such a video carries."""
    return functools.partial(number_of, bits=SMALL_BITS)


def skip_without(decoder: str) -> None:
    """Skip a test whose decoder, or the libraries it needs, is not here; PyAV always is."""
    try:
        open_video(b"", decoder)
    except SampleError:  # it is there: no bytes are no video
        return
    except DataError as error:
        assert decoder != "pyav", error
        pytest.skip(str(error))


def film_maker(root: Path, kinds: Mapping[str, Mapping[str, Any]]) -> Callable[[str], Path]:
    """Give the film of a kind, written when it is first asked for; read only."""

    def film(kind: str) -> Path:
        path = root / kind
        return path if path.exists() else write_film(path, **kinds[kind])

    return film


#: Times of uneven frames, ms: the frame period changes all the time; 20 s in all.
UNEVEN = [sum((20, 40, 130, 30)[n % 4] for n in range(count)) for count in range(364)]
#: Options of `write_film` for films that packing and reading must both take.
HARD: dict[str, dict[str, Any]] = {
    "uneven.mp4": {"times_ms": UNEVEN, "frames": len(UNEVEN)},
    "uneven.mkv": {"times_ms": UNEVEN, "frames": len(UNEVEN)},
    "open_gop.mp4": {"gop": 30, "options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=30:min-keyint=30"}},
    "fragments.mp4": {"muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "live.mkv": {"muxing": {"live": "1"}},
    "edited.mp4": {"hidden": 10, "frames": 260},
}
