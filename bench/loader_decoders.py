"""Clips a second of the whole loader by decoder and number of data workers, by the clock: a GPU's beside the CPU's.

    python bench/loader_decoders.py [VIDEO ...] [--decoders pyav torchcodec_cuda] [--workers 0 2 4 8] [--out FILE]

VIDEOs of more than 70 frames, by default one that is made up, are encoded at short side 320 as published sets come (a
GOP of 250) and as pack.py does. Each way makes clips of 16 frames, stride 4, 224 x 224, with the masks of ViT-B's dual
masking. A decoder that can't work here has the reason in its row. Run it while the GPU does nothing else: NVDEC is a
unit of its own, but its frames pass through the GPU's memory. The last column is what the workers took of that memory.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench import loader_rivals
from bench.loader import PACKINGS, rate, recipe_for
from pretrain.data.stream import TrainStream
from pretrain.data.stream_plan import open_plan
from pretrain.errors import TubeletError
from pretrain.objectives.base import method_of

DECODERS, WORKERS = ("pyav", "torchcodec", "torchcodec_cuda"), (0, 2, 4, 8)
#: A made-up film: ten seconds at 640 x 360.
FRAMES, WIDTH, HEIGHT = 300, 640, 360


@dataclass(frozen=True)
class DecoderRate:
    """One way: `clips_per_s` of one rank by the clock; None where it can't work, with the reason in `error`.

    `gpu_gb` is memory of the GPU that its workers took together.
    """

    packing: str
    decoder: str
    workers: int
    clips_per_s: float | None
    gpu_gb: float = 0.0
    error: str = ""


def decoder_rates(
    videos: Sequence[Path] = (),
    decoders: Sequence[str] = DECODERS,
    workers: Sequence[int] = WORKERS,
    clips: int = 64,
) -> Iterator[DecoderRate]:
    """Measure every decoder with every number of workers; seconds each, the first is there after packing.

    Args:
        videos: of more than 70 frames; none: a made-up one.
        decoders: as input.decoder takes them.
        workers: data workers; 0: this process decodes.
        clips: timed of each way, after one from each worker.
    """
    with tempfile.TemporaryDirectory() as folder:
        films = list(videos) or [made_up_film(Path(folder, "film.mp4"))]
        for packing, how in PACKINGS.items():
            shards = loader_rivals.prepare(films, how, Path(folder, packing.replace(" ", "_"))).url
            for decoder, count in itertools.product(decoders, workers):
                yield _measured(packing, shards, decoder, count, clips)


def _measured(packing: str, shards: str, decoder: str, workers: int, clips: int) -> DecoderRate:
    recipe = recipe_for(shards, 1, 1, 10_000)
    recipe = replace(recipe, input=replace(recipe.input, decoder=decoder))
    plan = open_plan(recipe.data, recipe.batch, recipe.run.seed)
    before, stream = _gpu_bytes(), None
    try:
        stream = TrainStream(plan, method_of(recipe).samples(), 0, 1, workers=workers)
        for _ in range(workers):
            next(stream)  # one of each worker: its process, its libraries, its context on the GPU
        found = rate(stream, clips, time.perf_counter)
        return DecoderRate(packing, decoder, workers, found, (_gpu_bytes() - before) / 1e9)
    except TubeletError as error:
        return DecoderRate(packing, decoder, workers, None, error=str(error))
    finally:
        if stream is not None:
            stream.close()


def _gpu_bytes() -> int:
    """Bytes that all processes hold of the GPU."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def made_up_film(path: Path) -> Path:
    """Write a film of moving noise that is neither trivial nor impossible to code."""
    import av

    rng = np.random.default_rng(0)
    # Large patches below, fine ones above: textures that move as a whole, as a camera's do.
    ground = np.kron(rng.integers(0, 200, (HEIGHT // 20, WIDTH // 10, 3)), np.ones((20, 20, 1)))
    ground += np.kron(rng.integers(0, 55, (HEIGHT // 4, WIDTH // 2, 3)), np.ones((4, 4, 1)))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            picture = np.ascontiguousarray(ground[:, 2 * number : 2 * number + WIDTH], dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def as_row(found: DecoderRate) -> str:
    """One line of the table."""
    what = f"| {found.packing} | {found.decoder} | {found.workers} |"
    if found.clips_per_s is None:
        return f"{what} {found.error} | |"
    return f"{what} {found.clips_per_s:.1f} | {found.gpu_gb:.2f} |"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path)
    parser.add_argument("--decoders", nargs="+", default=DECODERS)
    parser.add_argument("--workers", nargs="+", type=int, default=WORKERS)
    parser.add_argument("--clips", type=int, default=64, help="clips of each way (default 64)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args()
    lines = ["| packing | input.decoder | data.workers | clips / s | GB of the GPU |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    for found in decoder_rates(options.videos, options.decoders, options.workers, options.clips):
        lines.append(as_row(found))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
