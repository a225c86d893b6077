"""Programs on all ranks: the run's own step by ZeRO stage beside its plan, what it waits for, and a hang."""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu_session.session import Rows, Session, forget, median_seconds
from pretrain.data.bad_samples import BadSampleLedger
from pretrain.engine.batches import MicroBatches
from pretrain.engine.build import Built, build_engine, count_model
from pretrain.engine.prefetch import on_device
from pretrain.engine.step import StepInputs, train_step
from pretrain.guards.incidents import Incidents
from pretrain.guards.step_guard import StepGuard
from pretrain.objectives.base import Method, method_of
from pretrain.plan.peak_memory import OVERHEAD, memory_of
from pretrain.plan.trace import trace_step
from pretrain.runtime.process_group import WORK_TIMEOUT_S, Ranks, set_timeout

#: ZeRO stage 3 comes last: what DeepSpeed then does with linear layers stays.
STAGES = (1, 2, 3)
#: Longer than NCCL's own ten minutes, which every group that was overlooked would keep.
HANG_S = 620.0
Interval = tuple[float, float]


class Endless:
    """A stream that gives the same micro-batch again and again, from pinned memory where there is a device.

    Args:
        batch: of `Method.example`.
        device: of the rank.
    """

    error = None

    def __init__(self, batch: Any, device: torch.device) -> None:
        pins = device.type != "cpu"
        self._batch = {
            name: value.pin_memory() if pins and isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def __next__(self) -> Any:
        return dict(self._batch)

    def source_of(self, step: int) -> str:
        """Name no source, as a mixed stream does."""
        return ""

    def close(self) -> None:
        """Nothing is open."""


def engine(session: Session, ranks: Ranks) -> dict[str, Rows]:
    """Measure train_step on made-up data in stages 1 to 3, with and without what it adds to DeepSpeed's step."""
    micro = 2 if session.toy else 32
    words = (f"batch.micro={micro}", f"batch.samples={micro * ranks.world_size}", "input.views=1")
    rows = []
    for stage in STAGES:
        method = method_of(session.recipe("vit_b_dual", *words, f"zero.stage={stage}"))
        rows.append({"ZeRO": stage, "ranks": ranks.world_size} | _measured(session, method, ranks))
    return {"vit_b_dual: a step of the engine, one micro-batch a rank": rows}


def _measured(session: Session, method: Method, ranks: Ranks) -> dict[str, Any]:
    micro = method.recipe.batch.micro
    built = build_engine(method, ranks, 1)
    batches: Any = MicroBatches(Endless(method.example(micro), ranks.device), ranks.device)  # type: ignore[arg-type]
    inputs = step_inputs(session.folder, method, built, batches, ranks)
    numbers = iter(range(10**9))
    whole = median_seconds(lambda: train_step(inputs, next(numbers), 1e-5), ranks.device)
    peak = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else 0
    waits = _waits(inputs, next(numbers), ranks.device)
    sent, exposed = _exposed(inputs, numbers, ranks.device)
    bare = median_seconds(lambda: _bare_step(built, batches, ranks.device), ranks.device)
    batches.close()
    trace = trace_step(method, micro, on_cpu=session.toy)
    planned = memory_of(method.recipe, count_model(method), ranks.world_size, trace.peak_bytes, on_cpu=session.toy)
    built.engine.destroy()
    forget(ranks.device)
    return {
        "step, ms": 1e3 * whole,
        "without agreement, guards, read-backs, ms": 1e3 * bare,
        "clips/s a device": trace.clips / whole,
        "waits of the host": waits,
        "communication, ms": 1e3 * sent,
        "of it exposed, ms": 1e3 * exposed,
        "GB": peak / 1e9,
        f"planned, without {OVERHEAD / 1e9:g} GB of overhead, GB": planned.total / 1e9,
        "planned / measured": planned.total / peak if peak else None,
    }


def step_inputs(folder: Path, method: Method, built: Built, batches: MicroBatches, ranks: Ranks) -> StepInputs:
    """Put together what a run's step takes; stages 1 to 3 only, where DeepSpeed clips."""
    recipe = method.recipe
    return StepInputs(
        engine=built.engine, turns=built.turns, cache=built.cache, batches=batches, accumulation=1, own_clip=None,
        ledger=BadSampleLedger(None, list(recipe.data.sources), 0.1, 10), ranks=ranks, seed=0,
        asked_to_stop=lambda: False, guard=StepGuard(recipe.guard), rows=built.rows,
        incidents=Incidents(folder, ranks, 0, list(recipe.data.sources)),
    )  # fmt: skip


def _bare_step(built: Built, batches: MicroBatches, device: torch.device) -> None:
    """Take DeepSpeed's step alone."""
    built.engine.backward(built.engine(on_device(next(batches), device)).loss)
    built.engine.step()


def _waits(inputs: StepInputs, number: int, device: torch.device) -> int | None:
    """Count how often the host waits for the device in a step, as CUDA's own debug mode sees it."""
    if device.type != "cuda":
        return None  # tests/engine/test_waits.py counts them without a device
    with warnings.catch_warnings(record=True) as seen, _sync_debug_mode():
        warnings.simplefilter("always")
        train_step(inputs, number, 1e-5)
    return sum("synchroniz" in str(one.message).lower() for one in seen)


@contextmanager
def _sync_debug_mode() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _exposed(inputs: StepInputs, numbers: Iterator[int], device: torch.device) -> Interval:
    """Profile three steps: seconds a step in which something is sent, and in which nothing is computed meanwhile."""
    on_gpu = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as recorded:
        for _ in range(3):
            train_step(inputs, next(numbers), 1e-5)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
    events = [(one.name.lower(), (one.time_range.start, one.time_range.end))
              for one in recorded.events() if one.device_type == kind]  # fmt: skip
    sent = [times for name, times in events if "nccl" in name or "gloo" in name]
    # Waiting of a CPU's thread for a collective is no work; on a GPU all other entries are kernels and copies.
    computed = [times for name, times in events if not any(word in name for word in ("nccl", "gloo", "c10d"))]
    return exposed_seconds(sent, computed, 1e6 * 3)


def exposed_seconds(sent: Iterable[Interval], computed: Iterable[Interval], unit: float = 1.0) -> Interval:
    """Sum the time in which something is sent, and that in which nothing is computed beside it.

    Args:
        sent: begin and end of each transfer; they may overlap.
        computed: the same of each computation.
        unit: divisor of both results.
    """
    sending, computing = merged(sent), merged(computed)
    hidden = 0.0
    for begin, end in sending:
        hidden += sum(max(0.0, min(end, until) - max(begin, since)) for since, until in computing)
    total = sum(end - begin for begin, end in sending)
    return total / unit, (total - hidden) / unit


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Join intervals that overlap."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def hang(session: Session, ranks: Ranks) -> dict[str, Rows]:
    """Let the last rank come to a step's collectives later than NCCL's ten minutes: the run must go on."""
    if ranks.world_size == 1:
        return {"hang": [{"error": "needs two GPUs: nobody waits for one rank alone"}]}
    pause = 3.0 if session.toy else HANG_S
    rows = []
    for stage in (2, 3):
        method = method_of(
            session.recipe(
                "vit_b_dual", "batch.micro=2", f"batch.samples={2 * ranks.world_size}", f"zero.stage={stage}"
            )
        )
        built = build_engine(method, ranks, 1)
        set_timeout(WORK_TIMEOUT_S)  # as the watchdog does before the first step
        # Stage 3 once more would be another ten minutes: a short pause shows that its groups are there.
        rows.append({"ZeRO": stage} | _late_step(built, method, ranks, pause if stage == 2 else min(pause, 5.0)))
    return {"a rank that is late": rows}


def _late_step(built: Built, method: Method, ranks: Ranks, pause: float) -> dict[str, Any]:
    batch = on_device(dict(method.example(2)), ranks.device)
    times: Sequence[float] = []
    for late in (False, True, False):
        started = time.perf_counter()
        if late and ranks.rank == ranks.world_size - 1:
            time.sleep(pause)
        loss = built.engine(batch).loss
        built.engine.backward(loss)
        built.engine.step()
        float(loss.detach())
        times = [*times, time.perf_counter() - started]
    built.engine.destroy()
    return {"late by, s": pause, "steps, s": ", ".join(f"{one:.1f}" for one in times), "went on": "yes"}
