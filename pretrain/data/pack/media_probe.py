"""Facts of a video file, read from its packets, without decoding more than one frame."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pretrain.data.decoders.streams import main_film
from pretrain.errors import SampleError

#: A frame may lie this far off an even grid, in frame periods, before its video counts as of variable frame rate.
GRID_TOLERANCE = 0.25


@dataclass(frozen=True)
class Facts:
    """A video as it came.

    Attributes:
        container, codec, pix_fmt, audio: FFmpeg's names; audio is None without sound.
        width, height: of the coded picture, before rotation, pixels.
        rotation: degrees counter-clockwise that a player turns the picture by: 0, 90, 180 or 270.
        pixel_aspect: width of a pixel over its height.
        fps: frames a second, the average where it varies.
        packets: coded frames in the file.
        listed: coded frames that the file's own table lists: more than `packets` when its end is missing.
        start: time stamp of the first frame, seconds.
        duration: seconds, the last frame's own duration included.
        vfr: frames are not evenly spaced in time.
    """

    container: str
    codec: str
    pix_fmt: str
    width: int
    height: int
    rotation: int
    pixel_aspect: Fraction
    fps: Fraction
    packets: int
    listed: int
    start: float
    duration: float
    vfr: bool
    audio: str | None


def probe(path: str, shown: range | None = None) -> Facts:
    """Look into the local video file `path`.

    Args:
        path: where.
        shown: time stamps, in the stream's ticks, of the only frames that count; None: all of them.

    Raises:
        SampleError: "unreadable", "no-video" or "no-frames".
    """
    import av

    try:
        with av.open(path) as container:
            video = video_stream(container)
            stamps, packets, discarded = _time_stamps(container, video, shown)
        # Opened anew: the packets have been read to the end, and not every container can be sought back in.
        with av.open(path) as container:
            video = video_stream(container)
            # PyAV tells the rotation of a frame, not of a stream.
            frame = next(container.decode(video), None)
            if frame is None:
                raise SampleError("no-frames", f"the {codec_name(video)} stream decodes to nothing")
            fps, vfr = _rate(stamps, packets, video)
            audio = next((codec_name(stream) for stream in container.streams.audio), None)
            return Facts(
                container=container.format.name,
                codec=codec_name(video),
                pix_fmt=video.codec_context.pix_fmt or frame.format.name,
                width=frame.width,
                height=frame.height,
                rotation=frame.rotation % 360,
                pixel_aspect=Fraction(video.sample_aspect_ratio or 1),
                fps=fps,
                packets=packets,
                listed=max(packets, video.frames - discarded),
                start=float(stamps[0]) if stamps.size else 0.0,
                duration=float(stamps[-1] - stamps[0] + 1 / fps) if stamps.size else float(packets / fps),
                vfr=vfr,
                audio=audio,
            )
    except (av.error.FFmpegError, UnicodeDecodeError, ValueError) as error:
        raise SampleError("unreadable", str(error)) from error


def codec_name(stream: Any) -> str:
    """Return FFmpeg's name of a stream's codec ("av1"), not of the library that decodes it ("libdav1d")."""
    return str(stream.codec_context.codec.canonical_name)


def video_stream(container: Any) -> Any:
    """Find the stream that is the file's film, not the cover picture of a song."""
    found = main_film(container)
    if found is not None and found.codec_context is not None:
        return found
    kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
    raise SampleError("no-video", f"the file holds {', '.join(kinds)} but no video stream")


def _time_stamps(container: Any, video: Any, shown: range | None) -> tuple[np.ndarray, int, int]:
    """Read presentation times in order, seconds (empty where there are none); count coded frames, frames edited out."""
    stamps: list[int] = []
    packets = discarded = 0
    for packet in container.demux(video):
        # What an edit list hides is never shown, though other frames may need it.
        if packet.size == 0 or packet.is_discard or (shown is not None and packet.pts not in shown):
            discarded += bool(packet.size)
            continue
        packets += 1
        if packet.pts is not None:
            stamps.append(packet.pts)
    complete = stamps if len(stamps) == packets else []
    return np.sort(np.array(complete, dtype=np.float64)) * float(video.time_base), packets, discarded


def _rate(stamps: np.ndarray, packets: int, video: Any) -> tuple[Fraction, bool]:
    stated = video.average_rate or video.guessed_rate or Fraction(25)
    if len(stamps) < 2 or stamps[-1] <= stamps[0]:
        return Fraction(stated), False
    measured = (len(stamps) - 1) / float(stamps[-1] - stamps[0])
    grid = stamps[0] + np.arange(len(stamps)) / measured
    vfr = bool(np.abs(stamps - grid).max() * measured > GRID_TOLERANCE)
    # Where both agree the stated rate is kept: it is exact (30000/1001), a measured one is rounded.
    if abs(measured - stated) < 0.002 * measured:
        return Fraction(stated), vfr
    return Fraction(measured).limit_denominator(1001), vfr
