"""The step on one core, ours beside others: targets, forward, loss, backward. ViT-S, B, L shapes, 16 x 224 x 224.

    python bench/step.py                                   ours against a plain implementation of the same maths
    python bench/step.py --official ~/VideoMAEv2           against your checkout of the official code as well
    python bench/step.py --size small base --profile       and where the time goes

Contestants take turns; times are processor time of the one thread, medians of --rounds. The limit is written down
first: the rate of large matrix products in the same process. `of the limit` = needed FLOPs / time / that rate.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.plain_videomae import PlainVideoMAE, plain_targets  # noqa: E402
from pretrain.data.media import MEAN, STD  # noqa: E402
from pretrain.objectives.base import method_of  # noqa: E402
from pretrain.plan.trace import trace_step  # noqa: E402
from pretrain.recipe.load import load_recipe  # noqa: E402

#: Square matrices whose product is the limit.
LIMIT_SIZE = 2048


@dataclass
class Contestant:
    """One way to take a step: `run` returns the loss, `flops` are those of the arithmetic that it needs."""

    name: str
    run: Callable[[], Tensor]
    flops: float
    dtype: torch.dtype
    parameters: list[nn.Parameter]
    times: list[float] = field(default_factory=list)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products on this thread, by processor time, best of 5."""
    left, right = torch.randn(LIMIT_SIZE, LIMIT_SIZE).to(dtype), torch.randn(LIMIT_SIZE, LIMIT_SIZE).to(dtype)
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        left @ right
        best = min(best, time.process_time() - started)
    return 2 * LIMIT_SIZE**3 / best


def contestants(size: str, clips: int, official: Path | None, compiled: bool) -> list[Contestant]:
    """All ways to take the same step, on the same weights and the same batch."""
    words = [f"model.size={size}", "input.views=1", "compute.activation_checkpointing=false"]
    recipe = load_recipe("vit_s_dual", words)
    v1 = load_recipe("vit_s_dual", [*words, "objective.decoder_mask=none"])
    torch.manual_seed(0)
    objective = method_of(recipe).build()
    reduced = method_of(recipe).build().to(torch.bfloat16)
    reduced.load_state_dict(objective.state_dict())
    batch, masks = made_up(recipe, clips)
    _, v1_masks = made_up(v1, clips)
    needed = trace_step(method_of(recipe), clips).flops()
    needed_v1 = trace_step(method_of(v1), clips).flops()
    plain = PlainVideoMAE(objective.model)
    video = normalised(batch["video"])
    float32, bfloat16 = torch.float32, torch.bfloat16
    weights, reduced_weights = list(objective.parameters()), list(reduced.parameters())
    found = [
        Contestant("plain, dual masking", lambda: plain(video, *masks), needed, float32, weights),
        Contestant("plain, V1 style", lambda: plain(video, *v1_masks), needed_v1, float32, weights),
        Contestant("ours, dual masking", lambda: objective(batch).loss, needed, float32, weights),
        Contestant("ours, dual masking, bf16", lambda: reduced(batch).loss, needed, bfloat16, reduced_weights),
    ]
    if official:
        model = official_model(official, size, objective.model)
        own = list(model.parameters())
        found += [
            Contestant("official, dual masking", lambda: official_loss(model, video, *masks), needed, float32, own),
            Contestant("official, V1 style", lambda: official_loss(model, video, *v1_masks), needed_v1, float32, own),
        ]
    if compiled:
        fast, fast_reduced = torch.compile(objective), torch.compile(reduced)
        found += [
            Contestant("ours, compiled", lambda: fast(batch).loss, needed, float32, weights),
            Contestant("ours, compiled, bf16", lambda: fast_reduced(batch).loss, needed, bfloat16, reduced_weights),
        ]
    return found


def made_up(recipe: Any, clips: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """A batch of noise with our index masks, and the same masks as the official booleans: hidden, not reconstructed."""
    batch = method_of(recipe).example(clips)
    tokens = 8 * 14 * 14
    hidden = torch.ones(clips, tokens, dtype=torch.bool).scatter(1, batch["visible"], False)
    left_out = torch.ones(clips, tokens, dtype=torch.bool).scatter(1, batch["targets"], False)
    return batch, (hidden, left_out)


def normalised(video: Tensor) -> Tensor:
    """ImageNet-normalised float32 [B, 3, T, H, W], which the official loader hands over."""
    pixels = video.float() / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 4, 1, 2, 3).contiguous()


def official_model(checkout: Path, size: str, ours: nn.Module) -> nn.Module:
    """The model of a checkout of OpenGVLab/VideoMAEv2 with our weights."""
    from pretrain.runtime.vision_ops import ensure_torchvision

    ensure_torchvision()
    sys.path.insert(0, str(checkout))
    from models import modeling_pretrain  # type: ignore[import-not-found]

    model = getattr(modeling_pretrain, f"pretrain_videomae_{size}_patch16_224")(decoder_depth=4)
    missing, unexpected = model.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model


def official_loss(model: nn.Module, video: Tensor, hidden: Tensor, left_out: Tensor) -> Tensor:
    """The official model's loss, its targets made for every cube as the official loop does."""
    with torch.no_grad():
        labels = plain_targets(video, 2, 16)
        labels = labels[~left_out].reshape(len(video), -1, labels.shape[-1])
    errors = ((model(video, hidden, left_out) - labels) ** 2).mean(dim=-1)
    counted = hidden[~left_out].reshape(len(video), -1)
    return (errors * counted).sum() / counted.sum()


def race(found: list[Contestant], rounds: int) -> None:
    """Let all take their steps in turn; the first round, which warms up, does not count, but losses must agree."""
    for number in range(rounds + 1):
        for contestant in found:
            for parameter in contestant.parameters:
                parameter.grad = None
            started = time.process_time()
            contestant.run().backward()
            taken = time.process_time() - started
            if number:
                contestant.times.append(taken)
    losses = {c.name: float(c.run().detach()) for c in found}
    for style in ("dual", "V1"):
        of_style = [loss for name, loss in losses.items() if style in name and "bf16" not in name]
        assert max(of_style) - min(of_style) < 1e-4, losses


def report(size: str, found: list[Contestant], rates: dict[torch.dtype, float]) -> dict[str, Any]:
    """Print the table; returns it for the results file."""
    medians = {c.name: statistics.median(c.times) for c in found}
    base = medians.get("official, dual masking", medians["plain, dual masking"])
    base_v1 = medians.get("official, V1 style", medians["plain, V1 style"])
    print(f"\nViT-{size}: seconds, x dual step, x V1 step, of the limit")
    rows = {}
    for c in found:
        share = c.flops / medians[c.name] / rates[c.dtype]
        rows[c.name] = [medians[c.name], base / medians[c.name], base_v1 / medians[c.name], share]
        seconds, dual, v1, _ = rows[c.name]
        print(f"  {c.name:<28}{seconds:8.3f}{dual:8.2f}{v1:8.2f}{share:8.0%}")
    return rows


def profile(contestant: Contestant) -> None:
    """Print what takes the time of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        contestant.run().backward()
    print(f"\n{contestant.name}")
    print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["small"], choices=("small", "base", "large"))
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--official", type=Path, help="your checkout of OpenGVLab/VideoMAEv2")
    parser.add_argument("--compile", action="store_true", help="race the compiled objective as well")
    parser.add_argument("--profile", action="store_true", help="show where ours spends its time")
    parser.add_argument("--json", type=Path, help="write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates = {dtype: matmul_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    print("limit: " + ", ".join(f"{str(dtype)[6:]} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()))
    results: dict[str, Any] = {"limit_gflops": {str(dtype)[6:]: rate / 1e9 for dtype, rate in rates.items()}}
    for size in arguments.size:
        found = contestants(size, arguments.clips, arguments.official, arguments.compile)
        race(found, arguments.rounds)
        results[size] = report(size, found, rates)
        if arguments.profile:
            for contestant in found:
                if contestant.name.startswith("ours"):
                    profile(contestant)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
