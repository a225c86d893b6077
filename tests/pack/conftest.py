"""Small videos of many kinds, made by FFmpeg's encoders."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pretrain.data.pack.scheduling import leave_real_time

MakeVideo = Callable[..., Path]


def _pictures(count: int, width: int, height: int, seed: int) -> Iterator[np.ndarray[Any, Any]]:
    """A coarse random pattern that moves: neighbouring frames differ clearly, and compress well."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (height // 8 + 20, width // 8 + 40, 3), dtype=np.uint8)
    pattern = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    for number in range(count):
        top, left = 2 * number % 100, 3 * number % 200
        yield np.ascontiguousarray(pattern[top : top + height, left : left + width])


def _write(
    path: Path,
    frames: int = 24,
    size: tuple[int, int] = (128, 96),
    codec: str = "libx264",
    container: str | None = None,
    pix_fmt: str = "yuv420p",
    times_ms: list[int] | None = None,
    rotation: int = 0,
    b_frames: int | None = None,
    audio: bool = False,
    seed: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container) as out:
        video = out.add_stream(codec, rate=Fraction(25), options=options or {})
        video.width, video.height = size
        video.pix_fmt = pix_fmt
        if b_frames is not None:
            video.codec_context.max_b_frames = b_frames
        if rotation:
            video.set_display_rotation(rotation)
        if times_ms:
            video.codec_context.time_base = Fraction(1, 1000)
        sound = out.add_stream("aac", rate=44100) if audio else None
        for number, picture in enumerate(_pictures(frames, *size, seed)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if sound:
            _write_noise(out, sound, 44100 * frames // 25)
    leave_real_time()
    return path


def _write_noise(out: Any, stream: Any, samples: int) -> None:
    rng = np.random.default_rng(0)
    for start in range(0, samples, 1024):
        noise = av.AudioFrame.from_ndarray(rng.normal(0, 0.1, (1, 1024)).astype("f4"), format="fltp", layout="mono")
        noise.sample_rate, noise.pts = 44100, start
        out.mux(stream.encode(noise))
    out.mux(stream.encode(None))


@pytest.fixture(scope="session")
def make_video() -> MakeVideo:
    """A function that writes a video file."""
    return _write


@pytest.fixture(scope="session")
def make_sound() -> Callable[[Path], Path]:
    """A function that writes an mp4 file without pictures."""

    def write(path: Path) -> Path:
        with av.open(str(path), "w") as out:
            _write_noise(out, out.add_stream("aac", rate=44100), 44100)
        return path

    return write


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, make_video: MakeVideo) -> Path:
    """A folder with 3 classes x 4 videos; read only."""
    root = tmp_path_factory.mktemp("videos")
    for number in range(12):
        make_video(root / f"class{number % 3}" / f"v{number}.mp4", frames=10 + number, seed=number)
    return root
