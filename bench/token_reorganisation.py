"""Throughput of a classifier with and without token reorganisation, in one run on one device.

python bench/token_reorganisation.py --size base --batch 8
Random clips in memory, inference mode, warm-up, device synchronised, median of `--runs`. Rates take turns, so that
other load on the machine and a drifting clock fall on all of them alike.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from pretrain.models.classifier import Config, VideoClassifier, cost
from pretrain.models.token_reorganisation import Reorganisation, keep_rates, token_counts


def main() -> None:
    """Measure every keep rate and print a table."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = Config(size=options.size, drop_path=0.0)
    model = VideoClassifier(config, options.frames, options.side, options.side).to(device, dtype).eval()
    clips = torch.randn(options.batch, options.frames, options.side, options.side, 3, device=device, dtype=dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.size}, {options.frames}x{options.side}x{options.side}, batch {options.batch}, {dtype}, {name}")
    print("| keep rate | tokens at the end | GMAC | clips/s | against plain |\n|---|---|---|---|---|")
    rates = (1.0, *options.rates)
    seconds = measure(model, clips, rates, options.runs)
    for rate in rates:
        tokens = Reorganisation(rate)
        left = token_counts(model.grid.tokens, keep_rates(tokens, len(model.blocks)), fuse=True)[-1]
        gmac = sum(cost(Config(size=options.size, tokens=tokens), model.grid).values()) / 1e9
        gain = seconds[1.0] / seconds[rate]
        print(f"| {rate} | {left} | {gmac:.1f} | {options.batch / seconds[rate]:.2f} | {gain:.2f} |")


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("small", "base", "large", "huge", "giant"))
    parser.add_argument("--batch", type=int, default=8, help="clips in one forward pass")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--runs", type=int, default=10, help="timed forward passes for each rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    return parser.parse_args()


@torch.inference_mode()
def measure(model: VideoClassifier, clips: torch.Tensor, rates: Sequence[float], runs: int) -> dict[float, float]:
    """Median seconds of a forward pass at each rate, after two rounds that don't count."""
    times: dict[float, list[float]] = {rate: [] for rate in rates}
    for _ in range(runs + 2):
        for rate in rates:
            model.reorganise(Reorganisation(rate))
            start = time.perf_counter()
            model(clips)
            if clips.is_cuda:
                torch.cuda.synchronize()
            times[rate].append(time.perf_counter() - start)
    return {rate: statistics.median(found[2:]) for rate, found in times.items()}


if __name__ == "__main__":
    main()
