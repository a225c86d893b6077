"""Films with sound whose frames carry their number, and streams that may begin at different times."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np

from pretrain.data.members import Members
from tests.films import HEIGHT, WIDTH, picture

RATE = 24000


def talking_film(
    sound: np.ndarray | None,
    frames: int = 180,
    fps: int = 30,
    pictures_at: float = 0.0,
    sound_at: float = 0.0,
    codec: str = "flac",
    container: str = "mp4",
) -> bytes:
    """A film of numbered frames with a sound [N] at 24 kHz, lossless unless the codec is aac; delays in seconds."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as out:
        video = out.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        video.gop_size = 30
        heard: Any = None if sound is None else out.add_stream(codec, rate=RATE, layout="mono")
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="yuv420p")
            frame.pts, frame.time_base = number + round(pictures_at * fps), Fraction(1, fps)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if heard is not None and sound is not None:
            scaled = np.clip(np.round(sound * 32768), -32768, 32767).astype("<i2")[None]
            one = av.AudioFrame.from_ndarray(scaled, format="s16", layout="mono")
            one.sample_rate, one.time_base, one.pts = RATE, Fraction(1, RATE), round(sound_at * RATE)
            resampler = av.AudioResampler(format=heard.format.name, layout="mono", rate=RATE,
                                          frame_size=heard.frame_size or 4096)  # fmt: skip
            for part in [*resampler.resample(one), *resampler.resample(None)]:
                out.mux(heard.encode(part))
            out.mux(heard.encode(None))
    return target.getvalue()


def members_of_film(film: bytes, key: str = "film", **others: bytes) -> Members:
    """The film as a sample, with other files beside it."""
    return Members({"mp4": film, "json": b'{"label": 1}', **others}, key, "shard.tar")


def sine(hertz: float, seconds: float = 6.0, loud: float = 0.5) -> np.ndarray:
    """A tone, float32 [N]."""
    return (loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)
