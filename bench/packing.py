"""What packing can buy: bytes, decoding time of a clip and quality for several ways to encode the same videos.

python bench/packing.py VIDEO [VIDEO ...] [--clips 15] [--out bench/results/packing_DATE.md]
Each video is encoded as pack.py does (x264 medium, crf 23, short side 320); a clip is 16 frames, stride 4, from memory
to RGB, with one thread. Times are the process's CPU time, which a busy machine disturbs less than the clock; medians.
PSNR is that of the 224 x 224 centre crop against the original's, mean over frames.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from pretrain.data.decoders import open_video
from pretrain.data.pack.encode import encode_video
from pretrain.data.pack.media_probe import probe
from pretrain.data.pack.options import Options
from pretrain.samples.transforms import centre_crop

PHASE, STEP = 2, 4
VARIANTS = {
    "GOP 250, as published sets come": Options(gop=250, grid=0),
    "GOP 32": Options(grid=0),
    "GOP 32, tune fastdecode": Options(grid=0, tune="fastdecode"),
    "GOP 32, grid 4 (--tune none)": Options(),
    "GOP 32, grid 4, tune fastdecode (the default)": Options(tune="fastdecode"),
    "GOP 32, grid 2": Options(grid=2),
    "GOP 32, grid 4, short side 256": Options(short_side=256),
    "every frame a key frame": Options(gop=1, grid=0),
}


def main() -> None:
    """Encode, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=15, help="clips decoded for each number (default 15)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [f"# Packing, {date.today()}", "", f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}.", ""]
    lines += [__doc__.split("\n", 3)[3].strip(), ""]
    for video in options.videos:
        lines += [f"## {video.name}", "", *table(video, options.clips), ""]
        print("\n".join(lines), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines), encoding="utf-8")


def table(video: Path, clips: int) -> list[str]:
    """One row for each way to encode `video`."""
    facts = probe(str(video))
    rows = [
        "| stream | kB/s | PyAV, clip on the grid, ms | any clip | stride 2 | stride 1 | decord | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    original = pictures(video.read_bytes(), facts.packets)
    with tempfile.TemporaryDirectory() as folder:
        for name, options in VARIANTS.items():
            target = Path(folder, "video.mp4")
            encode_video(str(video), facts, str(target), options, PHASE if options.gridded else 0)
            data = target.read_bytes()
            rate = len(data) / 1e3 / (facts.packets / float(facts.fps))
            cells = [f"{rate:.0f}", *times(data, facts.packets, clips)]
            error = np.square(original - pictures(data, facts.packets)).mean((1, 2, 3))
            print(f"{video.name}: {name}: {cells}", flush=True)
            rows.append(f"| {name} | {' | '.join(cells)} | {np.mean(10 * np.log10(255**2 / error)):.1f} |")
    return rows


def pictures(data: bytes, frames: int) -> np.ndarray:
    """Centre crops of every fifth frame, on the grid and off it alike, float32 [n, 224, 224, 3]."""
    with open_video(data, "pyav") as reader:
        return centre_crop(reader.frames(np.arange(0, frames, 5)), 224, 224).astype(np.float32)


def times(data: bytes, frames: int, clips: int) -> list[str]:
    """CPU milliseconds of a clip: PyAV on the grid, anywhere, at strides 2 and 1; decord anywhere."""
    anywhere = np.random.default_rng(0).integers(PHASE, frames - 64, clips)
    on_grid = (anywhere - PHASE) // STEP * STEP + PHASE
    cases = [("pyav", on_grid, 4), ("pyav", anywhere, 4), ("pyav", on_grid, 2), ("pyav", anywhere, 1)]
    cases.append(("decord", anywhere, 4))
    found: list[list[float]] = [[] for _ in cases]
    for clip in range(clips):  # in turns, so that a neighbour's load meets all alike
        for case, (decoder, starts, stride) in enumerate(cases):
            begun = time.process_time()
            with open_video(data, decoder) as reader:
                reader.frames(starts[clip] + stride * np.arange(16))
            found[case].append(time.process_time() - begun)
    return [f"{1000 * statistics.median(one):.1f}" for one in found]


if __name__ == "__main__":
    main()
