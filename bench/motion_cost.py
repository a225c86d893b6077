"""What indexing motion costs, against decoding: CPU milliseconds a frame, and in training clips of 16 frames.

python bench/motion_cost.py VIDEO [VIDEO ...] [--rounds 3] [--frames 60] [--out bench/results/motion_cost_DATE.md]
Each video is encoded as pack.py does; its first frames are decoded in turn, alone and with each measure of
launch/motion_index.py. A clip is what `sampling: motion` reads: 16 frames all over the video. One thread; times are the
process's CPU time, which a busy machine disturbs less than the clock; medians of rounds in turns.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from pretrain.data.decoders import open_video
from pretrain.data.pack.encode import encode_video
from pretrain.data.pack.media_probe import probe
from pretrain.data.pack.options import Options
from pretrain.samples.motion_curves import FeatureDifference, MotionMeasure, measure_of, motion_curve

FRAMES = 16


def measures() -> dict[str, tuple[MotionMeasure, int | None]]:
    """What is timed: measure and short side."""
    convolution = FeatureDifference(torch.randn(8, 3, 7, 7) * 0.01, torch.zeros(8))
    ssim, difference = measure_of("ssim"), measure_of("abs")
    return {
        "ssim (the default)": (ssim, None),
        "ssim, short side 128": (ssim, 128),
        "abs": (difference, None),
        "abs, short side 128": (difference, 128),
        "feature": (convolution, None),
        "feature, short side 128": (convolution, 128),
    }


def main() -> None:
    """Encode, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured (default 3)")
    parser.add_argument("--frames", type=int, default=60, help="frames that are measured (default 60)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"# Indexing motion, {date.today()}",
        "",
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.0f}.",
    ]
    lines += ["", __doc__.split("\n", 3)[3].strip(), ""]
    for video in options.videos:
        lines += [*table(video, options.rounds, options.frames), ""]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines), encoding="utf-8")


def table(video: Path, rounds: int, frames: int) -> list[str]:
    """A row for decoding and for each measure."""
    facts = probe(str(video))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "video.mp4")
        encode_video(str(video), facts, str(target), Options(tune="fastdecode"), 2)
        data = target.read_bytes()
    with open_video(data, "pyav") as reader:
        total, shape = reader.num_frames, reader.frames([0]).shape[1:3]
    count = min(frames, total)
    cases: dict[str, Callable[[], object]] = {
        "decoding alone": lambda: decoded(data, count),
        **{name: lambda how=how: indexed(data, count, *how) for name, how in measures().items()},  # type: ignore[misc]
        f"a clip of {FRAMES}": lambda: clip(data, total),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            begun = time.process_time()
            case()
            found[name].append(1000 * (time.process_time() - begun))
    medians = {name: statistics.median(times) for name, times in found.items()}
    one_clip = medians.pop(f"a clip of {FRAMES}")
    whole = total / count
    rows = [
        f"{video.name}: {total} frames of {shape[1]} x {shape[0]}; a clip of {FRAMES} frames takes {one_clip:.0f} ms",
        "",
    ]
    rows += ["| all frames of the video | ms a frame | as many clips | as much decoding |", "|---|---|---|---|"]
    for name, median in medians.items():
        cells = f"{median / count:.2f} | {whole * median / one_clip:.1f} | {median / medians['decoding alone']:.1f}"
        rows.append(f"| {name} | {cells} |")
    return rows


def decoded(data: bytes, count: int) -> None:
    """Decode all frames in turn."""
    with open_video(data, "pyav") as reader:
        for _ in itertools.islice(reader.in_turn(), count):
            pass


def indexed(data: bytes, count: int, measure: MotionMeasure, side: int | None) -> None:
    """Make the curve."""
    with open_video(data, "pyav") as reader:
        motion_curve(itertools.islice(reader.in_turn(), count), measure, side)


def clip(data: bytes, total: int) -> None:
    """Decode frames all over the video."""
    with open_video(data, "pyav") as reader:
        reader.frames(np.linspace(0, total - 1, FRAMES).astype(int))


if __name__ == "__main__":
    main()
