"""A corpus of videos that are broken, odd, or not videos at all, each a few kB, made by FFmpeg's encoders and by hand.

python tests/data/broken_inputs.py FOLDER      writes all of them as files
"""

import functools
import io
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from pretrain.data.pack.scheduling import leave_real_time


@dataclass(frozen=True)
class Broken:
    """One input: the ending of its name, and its bytes."""

    ending: str
    data: bytes


@functools.cache
def _picture(number: int, width: int, height: int) -> np.ndarray[Any, Any]:
    """Coarse blocks that move: neighbouring frames differ clearly, and compress well; huge ones are flat."""
    if width > 2000:
        return np.full((height, width, 3), 40 + number, dtype=np.uint8)
    blocks = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    pattern = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    top, left = 2 * number % 100, 3 * number % 200
    part = pattern[top : top + min(height, 200), left : left + min(width, 400)]
    return np.ascontiguousarray(np.resize(part, (height, width, 3)))


@functools.cache
def video(
    frames: int = 24,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    container: str = "mp4",
    pixels: str = "yuv420p",
    gop: int = 8,
    b_frames: int = 2,
    times_ms: tuple[int, ...] = (),
    rotation: int = 0,
    sound: bool = False,
    options: tuple[tuple[str, str], ...] = (),
    muxer: tuple[tuple[str, str], ...] = (),
    first_pts: int = 0,
    keep: Callable[[int], bool] | None = None,
) -> bytes:
    """Encode a small video; `keep` says by packet number which packets get into the file."""
    # A named file: putting the index in front takes the muxer a second look at it.
    with (
        tempfile.NamedTemporaryFile() as target,
        av.open(target.name, "w", format=container, options=dict(muxer)) as file,
    ):
        chosen = dict(options)
        if codec == "libx264":  # otherwise the bytes depend on the processor
            chosen["x264-params"] = "cpu-independent=1:threads=1" + chosen.get("x264-params", "")
        stream: Any = file.add_stream(codec, rate=Fraction(25), options=chosen)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.gop_size = gop
        if codec in ("libx264", "libx265", "mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = b_frames
        if rotation:
            stream.set_display_rotation(rotation)
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        noise = _add_noise(file) if sound else None
        number = 0
        for index in range(frames + 1):
            for packet in stream.encode(_frame(index, size, times_ms, first_pts) if index < frames else None):
                if keep is None or keep(number):
                    file.mux(packet)
                number += 1
        if noise is not None:
            _mux_noise(file, noise)
        file.close()
        leave_real_time()
        return target.read()


def _frame(index: int, size: tuple[int, int], times_ms: tuple[int, ...], first_pts: int) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(_picture(index, *size), format="rgb24")
    frame.pts = first_pts + index
    if times_ms:
        frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
    return frame


def _add_noise(file: Any) -> Any:
    return file.add_stream("aac", rate=44100)


def _mux_noise(file: Any, stream: Any) -> None:
    rng = np.random.default_rng(0)
    for start in range(0, 22528, 1024):
        frame = av.AudioFrame.from_ndarray(rng.normal(0, 0.1, (1, 1024)).astype("f4"), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, start
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def _sound_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        _mux_noise(file, _add_noise(file))
    return out.getvalue()


def _still(kind: str) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(_picture(0, 64, 48)).save(out, kind)
    return out.getvalue()


def changed(data: bytes, begin: float, end: float, how: str) -> bytes:
    """Damage from share `begin` to share `end` of the bytes: zeroed, random, or one bit flipped in every 97th byte."""
    first, last = int(len(data) * begin), int(len(data) * end)
    part = bytearray(data[first:last])
    if how == "zero":
        part[:] = bytes(len(part))
    elif how == "random":
        part[:] = np.random.default_rng(0).integers(0, 256, len(part), dtype=np.uint8).tobytes()
    else:
        for place in range(0, len(part), 97):
            part[place] ^= 1 << (place % 8)
    return data[:first] + bytes(part) + data[last:]


def cut(data: bytes, share: float) -> bytes:
    """The first `share` of the bytes."""
    return data[: int(len(data) * share)]


def patched(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Overwrite bytes `offset` behind the four letters of an mp4 box."""
    place = data.index(box) + 4 + offset
    return data[:place] + value + data[place + len(value) :]


def inputs() -> dict[str, Broken]:
    """The corpus, by name."""
    sound_file = video()
    front = video(muxer=(("movflags", "faststart"),))
    mkv, ts = video(container="matroska"), video(container="mpegts")
    times = tuple(np.cumsum([(20, 40, 130)[i % 3] for i in range(24)]).tolist())
    tick = struct.pack(">I", 0)
    mp4: dict[str, bytes] = {
        "sound": sound_file,
        "empty": b"",
        "zero_bytes": bytes(4096),
        "text": b"this is no video\n" * 50,
        "html_error_page": b"<html><body>403 Forbidden</body></html>",
        "cut_after_header": sound_file[:40],
        "index_in_front_cut_30": cut(front, 0.3),
        "index_in_front_cut_60": cut(front, 0.6),
        "index_in_front_cut_95": cut(front, 0.95),
        "index_at_end_cut_50": cut(sound_file, 0.5),
        "index_at_end_last_byte_missing": sound_file[:-1],
        "index_missing": sound_file[: sound_file.index(b"moov") - 4],
        "index_only": front[: front.index(b"mdat") - 4],
        "zeroed_range": changed(front, 0.5, 0.7, "zero"),
        "random_range": changed(front, 0.5, 0.7, "random"),
        "bit_flips": changed(front, 0.4, 1.0, "flip"),
        "zeroed_index": changed(sound_file, 0.8, 0.95, "zero"),
        "flipped_index": changed(sound_file, 0.75, 1.0, "flip"),
        "junk_behind_the_end": sound_file + b"junk" * 1000,
        "audio_only": _sound_only(),
        "with_sound": video(sound=True),
        "one_frame": video(frames=1),
        "two_frames": video(frames=2, b_frames=0),
        "no_frames": video(frames=0),
        "variable_rate": video(times_ms=times),
        "odd_size": video(size=(63, 47), pixels="yuv444p"),
        "tiny": video(size=(16, 2)),
        "very_wide": video(frames=8, size=(1024, 16)),
        "huge": video(frames=2, size=(4096, 2304), b_frames=0, options=(("preset", "ultrafast"),)),
        "rotated_90": video(size=(128, 96), rotation=90),
        "ten_bit": video(pixels="yuv420p10le"),
        "hdr": video(
            pixels="yuv420p10le",
            options=(("x264-params", ":colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"),),
        ),
        "grey": video(pixels="gray"),
        "full_range": video(pixels="yuvj420p"),
        "single_key_frame": video(frames=120, gop=1000),
        "all_key_frames": video(gop=1, b_frames=0),
        "open_gop": video(frames=40, options=(("x264-params", ":open-gop=1:keyint=8:bframes=3"),)),
        "interlaced": video(options=(("x264-params", ":tff=1"),)),
        "lost_first_key_frame": video(keep=lambda number: number > 0),
        "lost_packets": video(frames=40, keep=lambda number: number % 5 != 3),
        "lost_first_group": video(frames=40, keep=lambda number: number >= 8),
        "edit_list": video(first_pts=-6),
        "late_start": video(first_pts=1000),
        "zero_time_scale": patched(sound_file, b"mdhd", 12, tick),
        "zero_rate": patched(sound_file, b"stts", 12, tick),
        "lying_size": patched(sound_file, b"avc1", 24, struct.pack(">HH", 9999, 9999)),
        "unknown_codec": sound_file.replace(b"avc1", b"zzzz"),
        "hevc": video(codec="libx265", options=(("x265-params", "log-level=none"),)),
        "av1": video(codec="libsvtav1", options=(("preset", "12"), ("svtav1-params", "lp=1"))),
        "mpeg4": video(codec="mpeg4"),
        "jpeg_in_mp4": _still("JPEG"),
        "matroska_in_mp4": mkv,
        "fragmented": video(muxer=(("movflags", "frag_keyframe+empty_moov"),)),
        "fragmented_cut_60": cut(video(muxer=(("movflags", "frag_keyframe+empty_moov"),)), 0.6),
    }
    others = {
        "matroska_cut_60": Broken("mkv", cut(mkv, 0.6)),
        "matroska_bit_flips": Broken("mkv", changed(mkv, 0.4, 1.0, "flip")),
        "transport_stream": Broken("ts", ts),
        "transport_stream_cut_60": Broken("ts", cut(ts, 0.6)),
        "transport_stream_packets_lost": Broken("ts", ts[: 188 * 30] + ts[188 * 34 :]),
        "avi_packed_b_frames": Broken("avi", video(codec="mpeg4", container="avi", b_frames=2)),
        "avi_mjpeg": Broken("avi", video(codec="mjpeg", container="avi", pixels="yuvj420p")),
        "avi_cut_60": Broken("avi", cut(video(codec="mpeg4", container="avi"), 0.6)),
        "mpeg_program_stream": Broken("mpg", video(codec="mpeg2video", container="vob")),
        "vp9_with_alpha": Broken("webm", video(codec="libvpx-vp9", container="webm", pixels="yuva420p")),
        "vp8": Broken("webm", video(codec="libvpx", container="webm")),
        "quicktime_png": Broken("mov", video(codec="png", container="mov", pixels="rgba", gop=1)),
        "gif": Broken("mp4", video(codec="gif", container="gif", pixels="rgb8", gop=1)),
        "raw_h264": Broken("mp4", video(container="h264")),
    }
    return {name: Broken("mp4", data) for name, data in mp4.items()} | others


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for name, one in inputs().items():
        (target / f"{name}.{one.ending}").write_bytes(one.data)
