"""Speed of SparseFormers beside ViTs of their accuracy, at several picture sizes, in one run on one device.

python bench/sparseformer.py --sides 224 384
Random pictures in memory, warm-up, models in turns. On a CPU processor time of the process with one thread, which other
load falls on less than on the clock; on an accelerator wall time, device synchronised. `--step` times a forward and a
backward pass besides. Weights are random ones, which cost as much as trained ones.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from pretrain.models import image_vit, sparseformer
from pretrain.models.base import Classifier

#: Model, published top-1 on ImageNet-1K at 224 x 224 (systems/sparseformer.md, section 4; DeiT's are its paper's).
PAIRS = (
    ("SparseFormer-T", 81.0, lambda side: _sparse("tiny")),
    ("DeiT-S", 79.8, lambda side: _vit(side, 384, 6)),
    ("SparseFormer-S", 82.0, lambda side: _sparse("small")),
    ("DeiT-B", 81.8, lambda side: _vit(side, 768, 12)),
)


@dataclass(frozen=True)
class Contestant:
    """A model at a size of pictures."""

    name: str
    accuracy: float
    side: int
    model: nn.Module
    macs: float


def main() -> None:
    """Measure all models at all sizes, and print a table."""
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread, processor time"
    print(f"batch {options.batch}, float32, {name}, median of {options.runs} rounds")
    models = [contestant(*pair, side, device) for side in options.sides for pair in PAIRS]
    found = {"forward": measure(models, options.runs, options.batch, device, _forward)}
    if options.step:
        found["step"] = measure(models, options.runs, options.batch, device, _step)
    print("| model | published top-1 | picture | parameters | GMAC |"
          + "".join(f" ms, {work} | pictures/s |" for work in found))  # fmt: skip
    print("|---" * (5 + 2 * len(found)) + "|")
    for index, one in enumerate(models):
        size = sum(value.numel() for value in one.model.parameters())
        each = [times[index] / options.batch for times in found.values()]
        times = "".join(f" {1e3 * seconds:.1f} | {1 / seconds:.2f} |" for seconds in each)
        accuracy = f"{one.accuracy} (at 224)"
        print(
            f"| {one.name} | {accuracy} | {one.side} | {size / 1e6:.1f} M | {one.macs / 1e9:.2f} |{times}", flush=True
        )


def contestant(
    name: str, accuracy: float, make: Callable[[int], Classifier], side: int, device: torch.device
) -> Contestant:
    """Build a model for pictures of a size."""
    architecture = make(side)
    architecture.input = SimpleNamespace(size=(1, side, side))
    return Contestant(name, accuracy, side, architecture.build().to(device), architecture.cost().executed)


def measure(
    models: list[Contestant], runs: int, batch: int, device: torch.device, work: Callable[[nn.Module, Tensor], None]
) -> list[float]:
    """Give each model's median seconds of `work` on a batch, after a round that doesn't count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: list[list[float]] = [[] for _ in models]
    for _ in range(runs + 1):
        for index, one in enumerate(models):
            pictures = torch.randn(batch, 1, one.side, one.side, 3, device=device)
            start = clock()
            work(one.model, pictures)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[index].append(clock() - start)
    return [statistics.median(found[1:]) for found in times]


@torch.no_grad()
def _forward(model: nn.Module, pictures: Tensor) -> None:
    model.eval()(pictures)


def _step(model: nn.Module, pictures: Tensor) -> None:
    model.train()(pictures).logsumexp(1).sum().backward()
    model.zero_grad(set_to_none=True)


def _sparse(size: str) -> Classifier:
    return sparseformer.ARCHITECTURE(sparseformer.Config(size=size), None)  # type: ignore[arg-type]


def _vit(side: int, dim: int, heads: int) -> Classifier:
    return image_vit.ARCHITECTURE(image_vit.Config(image_size=side, dim=dim, heads=heads), None)


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 384], help="of square pictures, pixels")
    parser.add_argument("--batch", type=int, default=4, help="pictures in one pass")
    parser.add_argument("--runs", type=int, default=5, help="timed rounds")
    parser.add_argument("--step", action="store_true", help="time forward and backward passes too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
