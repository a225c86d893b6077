"""What a large index costs the loader, and whether a worker's memory stays flat.

python bench/loader_scale.py [--samples 320] [--out FILE]
Each number is taken in a process of its own, so that it starts cold but for the file cache:

    first batch   an index of 10,000 shards x 1,000 samples of small videos (one shard under 10,000 names): imports,
                  index, order and the first micro-batch, on the clock and as CPU time
    memory        index and order arithmetic at 1 M and at 100 M samples (1,000 a shard), without any video
    flat          a worker's memory (RSS) while it makes --samples samples
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch.multiprocessing

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench.loader import ours, recipe_for
from pretrain.data.samples import Place
from pretrain.data.stream_plan import StreamPlan, open_plan


def main() -> None:
    """Prepare, measure in processes of their own, print."""
    options = parse()
    if options.measure:
        MEASURES[options.measure](options)
        return
    lines = [f"# Loader at scale, {date.today()}", ""]
    lines += [f"{os.cpu_count()} cores ({platform.machine()}), load average {os.getloadavg()[0]:.0f}", ""]
    with tempfile.TemporaryDirectory() as folder:
        real = Path(folder, "real")
        write_shard(real)
        write_index(real, 10_000, links=True)
        lines += ["| what | found |", "|---|---|", *child("first", real, options.samples)]
        for shards in (1_000, 100_000):
            write_index(Path(folder, str(shards)), shards, links=False)
            lines += child("memory", Path(folder, str(shards)), options.samples)
        lines += child("flat", real, options.samples)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=320, help="samples over which memory is watched (default 320)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(measure: str, folder: Path, samples: int) -> list[str]:
    """Rows that a new process finds."""
    words = [sys.executable, __file__, "--measure", measure, "--folder", str(folder), "--samples", str(samples)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "BEGUN": str(time.time())}
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environ).stdout.splitlines()


def write_shard(folder: Path) -> None:
    """1,000 samples, all the same video of 80 frames in 160 x 120, with the json that packing writes for it."""
    import io
    import json
    import tarfile

    import av

    from pretrain.data.index import MemberTable, write_members

    video = io.BytesIO()
    with av.open(video, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(80):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((120, 160, 3), number, np.uint8))))
        out.mux(stream.encode(None))
    folder.mkdir()
    offsets = []
    facts = json.dumps({"frames": 80, "stamps": {"first": 0, "step": 512}}).encode()
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number in range(1000):
            offsets.append(tar.offset)
            for ending, content in (("json", facts), ("mp4", video.getvalue())):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        sizes = np.diff([*offsets, tar.offset])
    write_members(
        str(folder), "shard.tar", MemberTable(tuple(f"{n:04d}" for n in range(1000)), np.array(offsets), sizes)
    )


def write_index(folder: Path, shards: int, links: bool) -> None:
    """An index of many shards; with links each of them is there, under its own name."""
    from pretrain.data.index import Shard, ShardIndex, ShardTable, write_index

    folder.mkdir(exist_ok=True)
    size = (folder / "shard.tar").stat().st_size if links else 500_000_000
    names = [f"shard-{number:06d}" for number in range(shards)]
    for name in names if links else []:
        (folder / f"{name}.tar").symlink_to("shard.tar")
        (folder / f"{name}.members.json").symlink_to("shard.members.json")
    entries = (Shard(f"{name}.tar", 1000, size, f"{number:064x}") for number, name in enumerate(names))
    write_index(ShardIndex(str(folder), ShardTable(entries)))


def first_batch(options: argparse.Namespace) -> None:
    """From the start of the interpreter to the first micro-batch."""
    next(ours(str(options.folder), 1, lanes=256, epoch_samples=None))
    wall, cpu = time.time() - float(os.environ["BEGUN"]), time.process_time()
    print(f"| first batch, 10,000 shards x 1,000, cold process | {wall:.1f} s on the clock, {cpu:.1f} s of CPU |")


def memory(options: argparse.Namespace) -> None:
    """Index and order without a video, in a rank and in a data worker that got the index from it."""
    before, begun = resident(), time.process_time()
    recipe = recipe_for(str(options.folder), 1, lanes=256, epoch_samples=None)
    plan = open_plan(recipe.data, recipe.batch, recipe.run.seed)
    samples = two_orders(plan)
    seconds, grown = time.process_time() - begun, resident() - before
    print(
        f"| index and two epochs' order, {samples / 1e6:.0f} M samples | {grown / 1e6:.0f} MB, "
        f"{grown / samples:.2f} bytes a sample; {seconds:.1f} s of CPU |"
    )
    spawn = torch.multiprocessing.get_context("spawn")
    found = spawn.SimpleQueue()
    workers = [spawn.Process(target=worker_memory, args=(plan, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    own = [found.get() / 1e6 for _ in workers]
    for worker in workers:
        worker.join()
    print(f"| the same in two data workers, all of their own memory | {' and '.join(f'{one:.0f}' for one in own)} MB |")


def two_orders(plan: StreamPlan) -> int:
    """Use the orders of two epochs; samples of one."""
    for epoch in range(2):
        plan.composition.order_of(Place(epoch, 0, 0, 0, 0)).locate(np.arange(0, 100_000, 7))
    return plan.composition.positions


def worker_memory(plan: StreamPlan, found: Any) -> None:
    """What a data worker has of its own when it knows where samples lie: not shared with its rank or other workers."""
    two_orders(plan)
    found.put(int(psutil.Process().memory_full_info().uss))


def flat(options: argparse.Namespace) -> None:
    """Memory at eighths of the way."""
    stream = ours(str(options.folder), 1, lanes=256, epoch_samples=None)
    found = []
    for number in range(1, options.samples + 1):
        next(stream)
        if number % (options.samples // 8) == 0:
            found.append(f"{resident() / 1e6:.0f}")
    print(f"| memory after each eighth of {options.samples:,} samples | {', '.join(found)} MB |")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


MEASURES: dict[str, Callable[[argparse.Namespace], None]] = {"first": first_batch, "memory": memory, "flat": flat}


if __name__ == "__main__":
    main()
