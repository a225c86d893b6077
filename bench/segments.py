"""Bytes and time of random clips of an hour's film that stays where it lies, against reading all of it.

python bench/segments.py [--minutes 60] [--clips 20] [--film NAME] [--out bench/results/segments_DATE.md]
The film: 426 x 240, 25 frames/s, a key frame every 250, about 1 Mbit/s, with sound; one minute that is encoded and
repeated. A clip is 16 frames, stride 4, from pack.py --in-place's shards to RGB by PyAV in this process. S3 is rclone
on loopback, which answers 10 ms late. Bytes are those of the film that the storage handed out; bytes and requests
are means, times are medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench.s3_server import s3_server
from pretrain.commands.pack import main as pack
from pretrain.data.decoders import open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.linked_video import LinkedVideo
from pretrain.data.members import parse_sample
from pretrain.runtime import storage
from pretrain.samples.sampling import clip_frames, clip_starts

LATENCY_S = 0.01
FPS, WIDTH, HEIGHT, RATE = 25, 426, 240, 44_100
FRAMES, STRIDE = 16, 4
#: Clips for which all of the film is read.
WHOLE_CLIPS = 2


class Cost(NamedTuple):
    """Of one clip: bytes and requests to the storage, seconds."""

    bytes: int
    requests: int
    seconds: float


def main() -> None:
    """Make the films, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60, help="length of the film (default 60)")
    parser.add_argument("--film", choices=FILMS, action="append", help="only this one; may be repeated")
    parser.add_argument("--clips", type=int, default=20, help="clips of each kind (default 20)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.minutes < 2:
        parser.error(
            f"--minutes {options.minutes}: 2 or more, for a minute is one piece, and too small to be read by ranges"
        )
    with tempfile.TemporaryDirectory() as folder:
        bucket = Path(folder, "s3", "bucket")
        bucket.mkdir(parents=True)
        minute = encode_minute(Path(folder, "minute.mp4"))
        chosen = options.film or list(FILMS)
        films = {name: repeat(minute, bucket / name, options.minutes, **FILMS[name]) for name in chosen}
        lines = heading(films, options)
        lines += table("local", lambda name: str(bucket / name), films, Path(folder, "local"), options.clips)
        with s3_server(bucket.parent, LATENCY_S):
            lines += table("S3", "s3://bucket/{}".format, films, Path(folder, "remote"), options.clips)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


FILMS: dict[str, dict[str, Any]] = {
    "end.mp4": {},
    "front.mp4": {"options": {"movflags": "faststart"}},
    "film.mkv": {},
}


def heading(films: dict[str, Path], options: argparse.Namespace) -> list[str]:
    """What was measured, and where."""
    sizes = ", ".join(f"{name} {path.stat().st_size / 1e6:.0f} MB" for name, path in films.items())
    return [
        f"# Clips of a film of {options.minutes} minutes, {date.today()}", "",
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}; {sizes}; {options.clips} clips of each kind,",
        f"{WHOLE_CLIPS} where all is read.", "", (__doc__ or "").split("\n", 3)[3].strip(), "",
        "| storage | film | way | MB a clip | share of the film | requests | ms a clip |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip


def table(
    storage_name: str, url: Callable[[str], str], films: dict[str, Path], folder: Path, clips: int
) -> Iterator[str]:
    """A row for each film and way."""
    for name, path in films.items():
        size = path.stat().st_size
        ways = {"all of it": whole_clips(url(name), size)}
        if name.endswith(".mp4"):
            ways["in place, anywhere"] = linked_clips(url(name), folder / f"{name} whole")
        for seconds in (10, 60):
            shards = folder / f"{name} {seconds}"
            ways[f"in place, --cut {seconds}"] = linked_clips(url(name), shards, "--cut", str(seconds))
        for way, costs in ways.items():
            taken = [next(costs) for _ in range(WHOLE_CLIPS if way == "all of it" else clips)]
            mean = statistics.mean(cost.bytes for cost in taken)
            requests = statistics.mean(cost.requests for cost in taken)
            typical = statistics.median(cost.seconds for cost in taken)
            row = (storage_name, name, way, f"{mean / 1e6:.2f}", f"{mean / size:.2%}", f"{requests:.1f}")
            yield f"| {' | '.join(row)} | {1e3 * typical:.0f} |"


def whole_clips(url: str, size: int) -> Iterator[Cost]:
    """Random clips, each from the whole film in memory."""
    rng = np.random.default_rng(0)
    while True:
        begun = time.perf_counter()
        decode(storage.read_bytes(url), rng)
        yield Cost(size, 1, time.perf_counter() - begun)


def linked_clips(url: str, shards: Path, *cut: str) -> Iterator[Cost]:
    """Random clips of random samples, as training reads them."""
    if pack(["--in-place", url, str(shards), *cut]):
        raise SystemExit(f"{url}: can't be linked")
    index, rng = load_index(str(shards)), np.random.default_rng(0)
    reader = SampleReader([index], None, 300.0)
    while True:
        row = int(rng.integers(index.samples))
        begun = time.perf_counter()
        video = parse_sample(reader.read(0, 0, row)).video()
        decode(video, rng)
        assert isinstance(video, LinkedVideo)
        yield Cost(video.fetched, video.requests, time.perf_counter() - begun)


def decode(video: Any, rng: np.random.Generator) -> None:
    """A random clip of a video."""
    with open_video(video, "pyav") as reader:
        start = int(rng.integers(clip_starts(reader.num_frames, FRAMES, STRIDE)))
        reader.frames(clip_frames(reader.num_frames, FRAMES, STRIDE, start))


def encode_minute(path: Path) -> Path:
    """A minute of moving noise, and of noise to hear."""
    import av

    rng = np.random.default_rng(0)
    wall = np.kron(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "b": "900k", "sc_threshold": "0"})
        video.width, video.height, video.pix_fmt, video.gop_size = WIDTH, HEIGHT, "yuv420p", 250
        sound = out.add_stream("aac", rate=RATE)
        for number in range(60 * FPS):
            top, left = number % 400, 2 * number % 500
            picture = np.ascontiguousarray(wall[top : top + HEIGHT, left : left + WIDTH])
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            noise = rng.normal(0, 0.1, (1, RATE // FPS)).astype("f4")
            frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, number * (RATE // FPS)
            out.mux(sound.encode(frame))
        out.mux([*video.encode(None), *sound.encode(None)])
    return path


def repeat(minute: Path, path: Path, times: int, options: dict[str, str] | None = None) -> Path:
    """The same minute again and again, as one film; nothing is encoded."""
    import av

    with av.open(str(path), "w", options=options or {}) as out:
        copies: dict[int, Any] = {}
        for number in range(times):
            with av.open(str(minute)) as container:
                if not copies:
                    copies = {stream.index: out.add_stream_from_template(stream) for stream in container.streams}
                for packet in container.demux():
                    if packet.size and packet.pts is not None and packet.dts is not None:
                        begin = packet.stream.type == "audio" and packet.pts < 0
                        shift = round(Fraction(60 * number) / packet.time_base)
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = copies[packet.stream.index]
                        if not begin:
                            out.mux(packet)
    return path


if __name__ == "__main__":
    main()
