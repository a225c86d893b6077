"""Clips a second and core of the loader, beside a bare decoder and a plain decord + PIL loader of the same output.

python bench/loader.py VIDEO [VIDEO ...] [--official PATH] [--clips 16] [--rounds 5] [--no-s3] [--out FILE]
VIDEOs of more than 70 frames are encoded at short side 320 twice: with a GOP of 250, as published data sets come, and
as pack.py does by default. Each way below then makes clips of 16 frames, stride 4, 224 x 224, with the masks of ViT-B's
dual masking. One process, one thread, no data workers; ways take turns, medians over rounds.

    bare      PyAV (or decord) in a loop over known frames to RGB, nothing else: the limit
    ours      data.stream.TrainStream from local shards; the same from S3 (rclone on loopback, 10 ms away)
    plain     an own plain loader: decord on a file, PIL crops and resizing, float tensors, normalised
    official  VideoMAEv2's dataset class, from your checkout (--official)

Local rates are clips a second of CPU time, which a busy machine disturbs less than the clock. S3 waits, so local and S3
are compared by the clock.
"""

import argparse
import gc
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench import loader_rivals
from bench.loader_rivals import VideoSet
from bench.s3_server import s3_server
from pretrain.data.stream import TrainStream
from pretrain.data.stream_plan import open_plan
from pretrain.models.videomae import Config as Model
from pretrain.objectives.base import method_of
from pretrain.objectives.videomae import Config as Objective
from pretrain.recipe.schema import Batch, Data, Recipe, Run, Source
from pretrain.samples.clip import Config as Clip

PACKINGS = {"GOP 250": ["--gop", "250", "--grid", "0", "--tune", "none"], "packed": []}
LATENCY_S = 0.01
#: decord goes on decoding for a while after the last frame that was asked for; the next way must not be charged for it.
SETTLE_S = 0.5


def main() -> None:
    """Encode, measure in turns, print."""
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sets = {
            name: loader_rivals.prepare(options.videos, how, Path(folder, name.replace(" ", "_")))
            for name, how in PACKINGS.items()
        }
        found: dict[str, list[float]] = defaultdict(list)
        ways = dict(make_ways(sets, options.official))
        gc.freeze()  # as data workers do
        for _ in range(options.rounds):
            for name, clips in ways.items():
                time.sleep(SETTLE_S)
                found[name].append(rate(clips, options.clips, time.process_time))
        lines = report({name: statistics.median(rates) for name, rates in found.items()}, options)
        if not options.no_s3:
            lines += s3_lines(sets["packed"], Path(folder, "s3"), options)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--official", type=Path, help="a checkout of OpenGVLab/VideoMAEv2")
    parser.add_argument("--clips", type=int, default=16, help="clips of each way in each round (default 16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make_ways(sets: dict[str, VideoSet], official: Path | None) -> Iterator[tuple[str, Iterator[Any]]]:
    """Everything that is measured, by name."""
    for name, videos in sets.items():
        yield f"bare pyav, {name}", loader_rivals.bare(videos, "pyav")
        yield f"bare decord, {name}", loader_rivals.bare(videos, "decord")
        for views in (1, 4):
            yield f"ours, {name}, {views}", ours(videos.url, views)
            yield f"plain, {name}, {views}", loader_rivals.plain(videos, views)
            if official:
                yield f"official, {name}, {views}", loader_rivals.official(videos, views, official)


def ours(url: str, views: int, lanes: int = 1, epoch_samples: int | None = 10_000) -> TrainStream:
    """Training's stream over the shards at `url`, in this process."""
    recipe = recipe_for(url, views, lanes, epoch_samples)
    plan = open_plan(recipe.data, recipe.batch, recipe.run.seed)
    return TrainStream(plan, method_of(recipe).samples(), 0, 1)


def recipe_for(url: str, views: int, lanes: int, epoch_samples: int | None) -> Recipe:
    """ViT-B's dual masking over the shards at `url`."""
    source = Source(shards=url, weight=1.0 if epoch_samples else None)
    data = Data(sources={"a": source}, workers=0, lanes=lanes, epoch_samples=epoch_samples)
    return Recipe(
        model=Model(size="base"),
        objective=Objective(),
        input=Clip(views=views),
        data=data,
        batch=Batch(samples=1, micro=1),
        run=Run(name="bench", dir="unused", seed=0),
    )


def rate(clips: Iterator[Any], count: int, clock: Callable[[], float]) -> float:
    """Decoded clips a second, after one that warms up."""
    next(clips)
    begun = clock()
    for _ in range(count):
        next(clips)
    return count / (clock() - begun)


def report(rates: dict[str, float], options: argparse.Namespace) -> list[str]:
    """Table of all ways and of the ratios that matter."""
    rival = "official" if options.official else "plain"
    ratios = {
        "ours / bare pyav, packed, 1 view": rates["ours, packed, 1"] / rates["bare pyav, packed"],
        "ours / bare pyav, GOP 250, 1 view": rates["ours, GOP 250, 1"] / rates["bare pyav, GOP 250"],
        f"ours packed / {rival} on GOP 250, 1 view": rates["ours, packed, 1"] / rates[f"{rival}, GOP 250, 1"],
        f"ours packed / {rival} on GOP 250, 4 views": rates["ours, packed, 4"] / rates[f"{rival}, GOP 250, 4"],
        f"ours / {rival}, both on GOP 250, 1 view": rates["ours, GOP 250, 1"] / rates[f"{rival}, GOP 250, 1"],
        f"ours / {rival}, both packed, 1 view": rates["ours, packed, 1"] / rates[f"{rival}, packed, 1"],
        f"ours / {rival}, both packed, 4 views": rates["ours, packed, 4"] / rates[f"{rival}, packed, 4"],
    }
    videos = ", ".join(video.name for video in options.videos)
    lines = [f"# Loader, {date.today()}", ""]
    lines += [f"{os.cpu_count()} cores ({platform.machine()}), load average {os.getloadavg()[0]:.0f},"]
    lines += [f"torch {torch.__version__}; {options.rounds} rounds of {options.clips} clips of {videos}.", ""]
    lines += ["| way | clips / s and core | frames / s and core |", "|---|---|---|"]
    lines += [f"| {name} | {found:.1f} | {16 * found:.0f} |" for name, found in rates.items()]
    return [*lines, "", "| ratio | |", "|---|---|", *(f"| {name} | {value:.2f} |" for name, value in ratios.items())]


def s3_lines(videos: VideoSet, folder: Path, options: argparse.Namespace) -> list[str]:
    """By the clock: local shards against the same on an S3 server that answers after 10 ms."""
    shutil.copytree(videos.url, folder / "bucket" / "packed")
    with s3_server(folder, LATENCY_S):
        streams = {"local": ours(videos.url, 1), "S3": ours("s3://bucket/packed", 1)}
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(options.rounds):
            for name, stream in streams.items():
                found[name].append(rate(stream, options.clips, time.perf_counter))
        for stream in streams.values():
            stream.close()
        time.sleep(SETTLE_S)  # reads in flight end; without a server they would be tried again for minutes
    local, remote = (statistics.median(rates) for rates in found.values())
    return ["", f"By the clock, packed, 1 view: local {local:.1f} clips/s, S3 {remote:.1f}: {remote / local:.2f}"]


if __name__ == "__main__":
    main()
