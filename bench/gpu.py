"""The step on one GPU in one command of less than ten minutes: rates, clips/s, MFU, memory, variants, profile.

    python bench/gpu.py --out bench/results/gpu.json        vit_b_dual and vit_g_dual
    python bench/gpu.py --recipe vit_b_dual --minutes 3
    python bench/gpu.py --recipe demo --device cpu          goes through the same code without a GPU

Needs torch, timm, omegaconf and numpy only: no DeepSpeed, no data. The limit is measured first, in the same process:
the rate of large matrix products, and of memory. MFU is three times the executed forward FLOPs, recomputed ones not
counted, over time and that rate. The file that --out writes is what `launch/plan.py --rates` reads.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from pretrain.engine.compiled_parts import compile_parts  # noqa: E402
from pretrain.engine.optimiser import build_optimizer, set_lr  # noqa: E402
from pretrain.objectives.base import method_of  # noqa: E402
from pretrain.plan.hardware import find_gpu  # noqa: E402
from pretrain.plan.trace import trace_step  # noqa: E402
from pretrain.recipe.load import load_recipe  # noqa: E402
from pretrain.runtime.speed import synchronize  # noqa: E402

#: Timed steps of a variant, after the warm-up.
STEPS, WARM_UP = 7, 3
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Bench:
    """Steps of one recipe on one device.

    Args:
        name: recipe.
        device: cuda or cpu.
        overrides: key=value.
        matmul_tflops: the limit.
    """

    def __init__(self, name: str, device: torch.device, overrides: list[str], matmul_tflops: float) -> None:
        self.name, self.device, self.overrides, self.rate = name, device, overrides, matmul_tflops * 1e12

    def run(self, micro: int, *overrides: str, compiled: bool = False, backend: str | None = None) -> dict[str, Any]:
        """Median step of `micro` videos; `clips_per_s` is None where the memory does not suffice."""
        recipe = load_recipe(self.name, [*self.overrides, *overrides])
        row: dict[str, Any] = {"micro": micro, "overrides": overrides, "compiled": compiled, "attention": backend}
        try:
            times = self._times(recipe, micro, compiled, backend)
        except torch.OutOfMemoryError:
            times = []
        except RuntimeError as error:  # an attention back end that does not take this shape or type
            return row | {"clips_per_s": None, "error": str(error).splitlines()[0]}
        finally:
            self._forget()
        if not times:
            return row | {"clips_per_s": None, "error": "out of memory"}
        seconds, trace = statistics.median(times), trace_step(method_of(recipe), micro)
        return row | {
            "clips_per_s": trace.clips / seconds,
            "mfu": 3 * trace.forward_flops / seconds / self.rate,
            "memory_gb": self._peak / 1e9,
            "planned_activations_gb": trace.peak_bytes / 1e9,
        }

    def largest(self, *overrides: str) -> int:
        """The largest power of two of videos that fits in memory."""
        micro = 1
        while micro < 512 and self.run(2 * micro, *overrides)["clips_per_s"] is not None:
            micro *= 2
            if self.device.type == "cpu":
                break
        return micro

    def profile(self, micro: int, *overrides: str) -> str:
        """Table of what takes the time of three steps."""
        recipe = load_recipe(self.name, [*self.overrides, *overrides])
        step = self._stepper(recipe, micro, False)
        step()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as recorded:
            for _ in range(3):
                step()
            synchronize(self.device)
        key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        self._forget()
        return recorded.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)

    def _times(self, recipe: Any, micro: int, compiled: bool, backend: str | None) -> list[float]:
        with _attention(backend):
            step = self._stepper(recipe, micro, compiled)
            times = []
            for number in range(WARM_UP + STEPS):
                synchronize(self.device)
                started = time.perf_counter()
                step()
                synchronize(self.device)
                if number >= WARM_UP:
                    times.append(time.perf_counter() - started)
        self._peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return times

    def _stepper(self, recipe: Any, micro: int, compiled: bool) -> Any:
        """A function that takes one step: forward, backward, fused AdamW; all in bf16, without float32 masters."""
        torch.manual_seed(0)
        method = method_of(recipe)
        with torch.device(self.device):
            module = method.build().to(torch.bfloat16)
        optimizer = build_optimizer(recipe, module, self.device)
        set_lr(optimizer, 1e-5)
        batch = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in method.example(micro).items()
        }
        if compiled:
            compile_parts(module)  # as the engine does

        def step() -> None:
            module(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def _forget(self) -> None:
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@contextlib.contextmanager
def _attention(backend: str | None) -> Iterator[None]:
    with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
        yield


def bench(run: Bench, deadline: float) -> dict[str, Any]:
    """All variants of one recipe, as many as the time allows, the telling ones first."""
    words = ("false", "true", "selective")
    keep, recompute, selective = (f"compute.activation_checkpointing={word}" for word in words)
    big, small = run.largest(recompute), run.largest(keep)
    variants: list[tuple[int, tuple[str, ...], bool, str | None]] = [
        (small, (keep,), False, None),
        (small, (keep,), True, None),
        (big, (recompute,), False, None),
        (big, (recompute,), True, None),
        (max(1, big // 2), (selective,), False, None),
        *((small, (keep,), False, backend) for backend in BACKENDS),
    ]
    rows = []
    print(f"\n{run.name}: videos, clips/s, MFU, GB")
    for micro, overrides, compiled, backend in variants:
        if time.monotonic() > deadline:
            print("  time is up; raise --minutes for the others")
            break
        row = run.run(micro, *overrides, compiled=compiled, backend=backend)
        rows.append(row)
        what = " ".join([overrides[0].partition("=")[2], "compiled" if compiled else "", backend or ""])
        if row["clips_per_s"] is None:
            print(f"  {micro:4d} {what:<32} {row['error'][:70]}")
        else:
            numbers = f"{row['clips_per_s']:8.1f} {row['mfu']:6.1%} {row['memory_gb']:7.1f}"
            print(f"  {micro:4d} {what:<32} {numbers}", flush=True)
    table = run.profile(small, keep)
    print(table)
    return {"rows": rows, "profile": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["vit_b_dual", "vit_g_dual"])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="no new variant begins after that (default 9)")
    parser.add_argument("--out", type=Path, help="JSON to write; launch/plan.py --rates reads it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: no GPU is visible to torch; --device cpu goes through the same code without one")
    device, started = torch.device(arguments.device), time.monotonic()
    torch.set_float32_matmul_precision("high")
    here = find_gpu("here")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}: matrix products {here.matmul_tflops:.3g} TFLOP/s, memory {here.memory_gbs:.0f} GB/s")
    results: dict[str, Any] = {
        "device": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "matmul_tflops": here.matmul_tflops, "memory_gbs": here.memory_gbs,
    }  # fmt: skip
    for number, recipe in enumerate(arguments.recipe):
        until = started + 60 * arguments.minutes * (number + 1) / len(arguments.recipe)
        results[recipe] = bench(Bench(recipe, device, arguments.overrides, here.matmul_tflops), until)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
