"""The step of one GPU without DeepSpeed: attention back ends, recomputation, compiling, FP8, memory, profile."""

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_session.session import Rows, Session, forget, median_seconds
from pretrain.engine.compiled_parts import compile_parts
from pretrain.engine.fp8 import check_fp8, multiply_in_fp8
from pretrain.engine.optimiser import build_optimizer, set_lr
from pretrain.errors import RecipeError
from pretrain.objectives.base import method_of
from pretrain.plan.estimate import Planner
from pretrain.plan.feeding import Resources
from pretrain.plan.hardware import find_gpu
from pretrain.plan.trace import trace_step
from pretrain.runtime.determinism import compute_alike
from pretrain.runtime.speed import synchronize

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
KEEP, RECOMPUTE, SELECTIVE = (f"compute.activation_checkpointing={word}" for word in ("false", "true", "selective"))
#: No new variant begins after so many seconds; one takes a minute at most, and a command has ten.
LAST_START_S = 480.0


class Bench:
    """Steps of one recipe on one device: forward, backward, fused AdamW, all in bf16 without float32 masters.

    Args:
        session: where.
        name: recipe.
    """

    def __init__(self, session: Session, name: str) -> None:
        torch.set_float32_matmul_precision("high")
        self.session, self.name, self.device = session, name, session.device
        self.gpu, self.begun = find_gpu("here"), time.monotonic()

    def row(self, what: str, micro: int, *overrides: str, backend: str | None = None) -> dict[str, Any]:
        """Measure `micro` videos a step; a variant that can't work has the reason in its row.

        MFU is three times the executed forward FLOPs, recomputed ones not counted, over time and the rate of large
        products, measured in this process.
        """
        row: dict[str, Any] = {"variant": what, "videos": micro}
        if time.monotonic() - self.begun > LAST_START_S:
            return row | {"error": "not measured: time is up"}
        try:
            with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
                seconds = median_seconds(self._stepper(micro, overrides), self.device)
            peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        except (RuntimeError, RecipeError) as error:  # too little memory, or a back end that does not take this shape
            return row | {"error": (str(error).splitlines() or ["?"])[0][:100]}
        finally:
            forget(self.device)
        trace = trace_step(method_of(self.session.recipe(self.name, *overrides)), micro)
        mfu = 3 * trace.forward_flops / seconds / (self.gpu.matmul_tflops * 1e12)
        planned = self._planned(micro, overrides)
        numbers = {"clips/s": trace.clips / seconds, "planned clips/s": planned, "MFU": mfu}
        return row | numbers | {"GB": peak / 1e9, "planned activations, GB": trace.peak_bytes / 1e9}

    def _planned(self, micro: int, overrides: tuple[str, ...]) -> float:
        """Compute what launch/plan.py says of such a step on one device with this one's measured rates."""
        one = (f"batch.samples={micro}", f"batch.micro={micro}", "batch.ranks=1")
        method = method_of(self.session.recipe(self.name, *overrides, *one))
        return Planner(method, self.gpu, Resources(), [], None).estimate(1).clips_per_s

    def largest(self, *overrides: str) -> int:
        """Find the largest power of two of videos that fits in memory."""
        micro = 1
        while micro < (2 if self.session.toy else 512) and "error" not in self.row("", 2 * micro, *overrides):
            micro *= 2
        return micro

    def profile(self, micro: int, *overrides: str) -> Rows:
        """List the kernels that take most of three steps."""
        step = self._stepper(micro, overrides)
        step()
        on_gpu = self.device.type == "cuda"
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])]
        with torch.profiler.profile(activities=kinds) as recorded:
            for _ in range(3):
                step()
            synchronize(self.device)
        forget(self.device)
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        found = sorted(recorded.key_averages(), key=lambda one: -getattr(one, key))
        total = sum(getattr(one, key) for one in found)
        shares = ((one, getattr(one, key)) for one in found[:20])
        return [{"kernel": one.key[:80], "calls": one.count, "ms": us / 1e3, "share": us / total} for one, us in shares]

    def _stepper(self, micro: int, overrides: tuple[str, ...]) -> Any:
        """Build a function that takes one step."""
        recipe = self.session.recipe(self.name, *overrides)
        torch.manual_seed(0)
        method = method_of(recipe)
        check_fp8(recipe.compute.fp8, self.device)
        with torch.device(self.device):
            module = method.build().to(torch.bfloat16)
        optimizer = build_optimizer(recipe, module, self.device)
        set_lr(optimizer, 1e-5)
        batch = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in method.example(micro).items()
        }
        multiply_in_fp8(module, recipe.compute.fp8)
        if recipe.compute.compile:
            compile_parts(module)  # as the engine does

        def step() -> None:
            module(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


def step_b(session: Session) -> dict[str, Rows]:
    """Measure ViT-B."""
    return _variants(Bench(session, "vit_b_dual"))


def step_g(session: Session) -> dict[str, Rows]:
    """Measure ViT-g."""
    return _variants(Bench(session, "vit_g_dual"))


def _variants(bench: Bench) -> dict[str, Rows]:
    """Measure recomputation, compiling and attention back ends, the telling ones first."""
    return {
        f"{bench.name}: the step on one device": list(_rows(bench)),
        f"{bench.name}: kernels of three steps, one video": bench.profile(1, KEEP),
    }


def _rows(bench: Bench) -> Iterator[dict[str, Any]]:
    small, big = bench.largest(KEEP), bench.largest(RECOMPUTE)
    yield bench.row("all kept", small, KEEP)
    yield bench.row("all kept, compiled", small, KEEP, "compute.compile=true")
    yield bench.row("recomputed", big, RECOMPUTE)
    yield bench.row("recomputed, compiled", big, RECOMPUTE, "compute.compile=true")
    yield bench.row("recomputed selectively", max(1, big // 2), SELECTIVE)
    for backend in BACKENDS:
        yield bench.row(f"all kept, attention: {backend}", small, KEEP, backend=backend)


def fp8(session: Session) -> dict[str, Rows]:
    """Compare FP8 with bf16, both compiled: ViT-g with recomputation, as its recipe says."""
    bench, tables = Bench(session, "vit_g_dual"), {}
    for name, recompute in (("recomputed", RECOMPUTE), ("all kept", KEEP)):
        micro = max(1, bench.largest(recompute) // 2)
        words = (recompute, "compute.compile=true")
        kinds = ("none", "tensorwise", "rowwise")
        rows = [bench.row(f"compute.fp8={kind}", micro, *words, f"compute.fp8={kind}") for kind in kinds]
        tables[f"vit_g_dual, {name}"] = rows
    return tables


def deterministic(session: Session) -> dict[str, Rows]:
    """Measure what compute.deterministic costs ViT-B; a process each, since cuBLAS is set up once in one."""
    rows = []
    for asked in (False, True):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(_deterministic_row, session, asked).result())
    return {"vit_b_dual": rows}


def _deterministic_row(session: Session, asked: bool) -> dict[str, Any]:
    compute_alike(session.device, asked)
    bench = Bench(session, "vit_b_dual")
    return bench.row(f"compute.deterministic={str(asked).lower()}", bench.largest(KEEP), KEEP)
