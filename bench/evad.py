"""Speed of EVAD with and without keyframe-centric pruning, in one run on one device, and its work by part.

python bench/evad.py --size base --batch 1
Random clips in memory, warm-up, device synchronised, median of `--runs`. Keep rates take turns, so that other load on
the machine falls on all of them alike; weights are the same, random ones, which cost as much as trained ones. `--step`
times a training step besides (forward and backward pass with activation checkpointing, no optimiser).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from finetune.evad.set_losses import mean_of_terms, set_losses
from finetune.evad.set_matching import AnnotatedPersons
from pretrain.models.base import Cost
from pretrain.models.cubes import grid_of
from pretrain.models.evad.detector import EVAD, cost
from pretrain.models.evad.detector_config import Config, pruning_of
from pretrain.models.keep_rates import keep_rates

FRAMES, PATCH = 16, 16


def main() -> None:
    """Measure every keep rate and print two tables."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = EVAD(Config(size=options.size), FRAMES, options.height, options.width, options.step).to(device).eval()
    video = torch.randn(options.batch, FRAMES, options.height, options.width, 3, device=device)
    sizes = torch.tensor([[options.height, options.width]] * options.batch, device=device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.size}, {FRAMES}x{options.height}x{options.width}, batch {options.batch}, float32, {name}")
    rates = [1.0, *options.rates]
    forward = measure(model, rates, options.runs, lambda: predict(model, video, sizes))
    steps = measure(model, rates, options.runs, lambda: step(model, video, sizes)) if options.step else {}
    grid = grid_of(FRAMES, options.height, options.width, 2, PATCH)
    costs = {rate: cost(replace(model.config, keep_rate=rate), grid) for rate in rates}
    print_speed(options.batch, costs, forward, steps)
    print_parts(costs)


def print_speed(batch: int, costs: dict[float, Cost], forward: dict[float, float], steps: dict[float, float]) -> None:
    """Print work and times at each keep rate, and what share of the unpruned one they are."""
    more = " ms/clip, a step | speed of a step |" if steps else ""
    print(f"| keep rate | tokens left | GMAC | of unpruned | ms/clip | speed |{more}")
    print("|---|---|---|---|---|---|" + ("---|---|" if steps else ""))
    for rate, counted in costs.items():
        row = f"| {rate:g} | {counted.tokens['behind the encoder']} | {counted.published / 1e9:.0f} "
        row += f"| {counted.published / costs[1.0].published:.2f} | {1e3 * forward[rate] / batch:.0f} "
        row += f"| {forward[1.0] / forward[rate]:.2f} |"
        if steps:
            row += f" {1e3 * steps[rate] / batch:.0f} | {steps[1.0] / steps[rate]:.2f} |"
        print(row, flush=True)


def print_parts(costs: dict[float, Cost]) -> None:
    """Print the work of each part, GMAC."""
    print("\n| part | " + " | ".join(f"GMAC at {rate:g}" for rate in costs) + " |")
    print("|---" * (len(costs) + 1) + "|")
    for part in next(iter(costs.values())).macs:
        print(f"| {part} | " + " | ".join(f"{one.macs[part] / 1e9:.1f}" for one in costs.values()) + " |")


def measure(model: EVAD, rates: list[float], runs: int, work: Callable[[], None]) -> dict[float, float]:
    """Give the median seconds of `work` at each rate, after a round that doesn't count."""
    times: dict[float, list[float]] = {rate: [] for rate in rates}
    for _ in range(runs + 1):
        for rate in rates:
            model.prune(keep_rates(pruning_of(replace(model.config, keep_rate=rate)), len(model.blocks)))
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[rate].append(time.perf_counter() - start)
    return {rate: statistics.median(found[1:]) for rate, found in times.items()}


@torch.no_grad()
def predict(model: EVAD, video: Tensor, sizes: Tensor) -> None:
    """One forward pass as in a test."""
    model(video, sizes)


def step(model: EVAD, video: Tensor, sizes: Tensor) -> None:
    """One forward and backward pass with three persons a clip."""
    count = len(video)
    side = float(sizes.min())
    boxes = torch.tensor([[0.1, 0.2, 0.4, 0.9], [0.3, 0.2, 0.7, 1.0], [0.6, 0.4, 0.9, 1.0]], device=video.device)
    labels = torch.zeros(3 * count, model.config.classes, device=video.device)
    labels[:, 0] = 1
    counts = torch.full((count,), 3, device=video.device)
    persons = AnnotatedPersons((side * boxes).repeat(count, 1), labels, counts, sizes)
    terms = set_losses(model(video, sizes), persons, torch.tensor(3.0 * count, device=video.device), 12.0)
    mean_of_terms(terms).backward()
    model.zero_grad(set_to_none=True)


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("base", "large"))
    parser.add_argument("--batch", type=int, default=1, help="clips in one forward pass")
    parser.add_argument("--height", type=int, default=288, help="pixels")
    parser.add_argument("--width", type=int, default=288, help="pixels")
    parser.add_argument("--runs", type=int, default=5, help="timed passes for each rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.7, 0.6])
    parser.add_argument("--step", action="store_true", help="time training steps too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
