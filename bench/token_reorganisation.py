"""Throughput of a classifier with and without token reorganisation, in one run on one device, and its accuracy.

python bench/token_reorganisation.py --size base --batch 8
python bench/token_reorganisation.py --tested runs/full_0 runs/full_1 --tuned runs/rate_0.7_0 runs/rate_0.7_1
Random clips in memory, inference mode, warm-up, device synchronised, median of `--runs`. Rates take turns, so that
other load on the machine and a drifting clock fall on all of them alike. With `--tested` (fine-tuning runs without
token reorganisation, of one recipe) the model is theirs, and each is tested at every rate as the recipe tests; runs of
`--tuned` were fine-tuned at a rate (model.tokens.keep_rate) and are tested at it. Means over runs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from finetune.classification.fine_tuned import FineTuned, load_fine_tuned
from finetune.classification.predictions import scores
from finetune.classification.validation import predict, test_views, video_sets
from pretrain.models.classifier import Config, VideoClassifier, cost
from pretrain.models.keep_rates import Reorganisation, keep_rates, token_counts
from pretrain.runtime.process_group import Ranks


def main() -> None:
    """Measure every keep rate and print a table."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = Config(size=options.size, drop_path=0.0)
    frames, side = options.frames, options.side
    tested = [load_fine_tuned(run) for run in options.tested]
    if tested:
        recipe = tested[0].recipe
        config, frames, side = recipe.model, recipe.input.frames, recipe.input.height
    model = VideoClassifier(config, frames, side, side).to(device, dtype).eval()
    clips = torch.randn(options.batch, frames, side, side, 3, device=device, dtype=dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{config.size}, {frames}x{side}x{side}, batch {options.batch}, {dtype}, {name}")
    rates = (1.0, *options.rates)
    seconds = measure(model, clips, rates, options.runs)
    tuned = [load_fine_tuned(run) for run in options.tuned]
    extra = " | top-1 as it is | top-1 fine-tuned at it" if tested else ""
    print(f"| keep rate | tokens at the end | GMAC | clips/s | against plain{extra} |")
    print("|---|---|---|---|---|" + ("---|---|" if tested else ""))
    for rate in rates:
        tokens = replace(config.tokens, keep_rate=rate)
        left = token_counts(model.grid.tokens, keep_rates(tokens, len(model.blocks)), fuse=True)[-1]
        gmac = sum(cost(replace(config, tokens=tokens), model.grid).values()) / 1e9
        gain = seconds[1.0] / seconds[rate]
        row = f"| {rate} | {left} | {gmac:.3g} | {options.batch / seconds[rate]:.2f} | {gain:.2f} |"
        if tested:
            at_rate = [one for one in tuned if one.recipe.model.tokens.keep_rate == rate]
            row += f" {mean_top1(tested, rate)} | {mean_top1(at_rate, rate)} |"
        print(row, flush=True)


def mean_top1(models: Sequence[FineTuned], rate: float) -> str:
    """Mean and spread of the tests of some models at a keep rate."""
    values = [top1(one, rate) for one in models]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} %"


def top1(tuned: FineTuned, rate: float) -> float:
    """Accuracy on the recipe's test videos, percent."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tuned.model.reorganise(replace(tuned.recipe.model.tokens, keep_rate=rate))
    sets, alone = video_sets(tuned.recipe, test=True), Ranks(0, 1, 0, device)
    return scores(predict(tuned.objective.to(device), tuned.recipe, alone, sets, test_views(tuned.recipe)))["top1"]


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("small", "base", "large", "huge", "giant"))
    parser.add_argument("--batch", type=int, default=8, help="clips in one forward pass")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--runs", type=int, default=10, help="timed forward passes for each rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--tested", type=Path, nargs="+", default=[], metavar="RUN", help="tested at every rate")
    parser.add_argument("--tuned", type=Path, nargs="+", default=[], metavar="RUN", help="fine-tuned at their rate")
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
