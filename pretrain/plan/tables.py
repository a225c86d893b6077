"""A plan as tables, as JSON, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import RecipeError
from pretrain.plan.dry_run import Section
from pretrain.plan.estimate import Estimate
from pretrain.plan.feeding import Resources
from pretrain.plan.peak_memory import OVERHEAD
from pretrain.plan.trace import BACKWARD
from pretrain.recipe.schema import Recipe

#: Seconds a node needs for each gigabyte of checkpoint it writes.
WRITE_S_PER_GB = 0.5

MEMORY_PARTS = ("weights", "gradients", "optimiser", "buffers", "activations")
TIME_PARTS = ("forward", "backward", "optimiser", "communication")


def sections(recipe: Recipe, plan: Estimate, resources: Resources) -> list[Section]:
    """Make the tables of one plan."""
    return [
        _work(plan),
        _memory(recipe, plan),
        _step(recipe, plan),
        _feeding(recipe, plan, resources),
        _run(plan),
        _problems(plan),
    ]


def _work(plan: Estimate) -> Section:
    section, trace = Section("work of one clip, executed"), plan.trace
    published = sum(plan.published_macs.values())
    section.add("parameters", f"{plan.parameters:,}")
    remark = "counts hidden cubes that are not embedded here"
    section.add("forward, as published", f"{published / 1e9:.1f} GMAC", remark)
    for part in trace.parts:
        macs, moved = trace.flops(part) / 2 / trace.clips, trace.bytes(part) / trace.clips
        remark = "recomputed activations included" if part == BACKWARD else ""
        section.add(f"  {part}", f"{macs / 1e9:,.2f} GMAC, {moved / 1e6:,.0f} MB", remark)
    section.add("together", f"{trace.flops() / 2 / trace.clips / 1e9:,.1f} GMAC", "bytes: read and written by kernels")
    return section


def _memory(recipe: Recipe, plan: Estimate) -> Section:
    memory, recompute = plan.memory, recipe.compute.activation_checkpointing
    section = Section(f"memory of one {plan.gpu.name} (ZeRO {recipe.zero.stage}, {recipe.compute.dtype})")
    for part in MEMORY_PARTS:
        section.add(part, f"{getattr(memory, part) / 1e9:,.2f} GB", _memory_remark(part, plan, bool(recompute)))
    if memory.host:
        section.add("host memory", f"{memory.host / 1e9:,.2f} GB", "optimiser states, zero.offload=cpu")
    section.add("libraries and allocator", f"{OVERHEAD / 1e9:,.2f} GB", "assumed")
    section.add("together", f"{(memory.total + OVERHEAD) / 1e9:,.2f} of {plan.gpu.memory / 1e9:,.0f} GB")
    section.add("largest micro-batch", f"{plan.largest_micro} videos", "that fits")
    return section


def _memory_remark(part: str, plan: Estimate, recompute: bool) -> str:
    if part != "activations":
        return ""
    how = "each block's input, the rest recomputed" if recompute else "all kept for the backward pass"
    return f"{plan.micro} videos, {plan.trace.clips} clips; {how}"


def _step(recipe: Recipe, plan: Estimate) -> Section:
    section, gpu, times = Section(f"one optimiser step on {plan.gpus} x {plan.gpu.name}"), plan.gpu, plan.times
    origin = "measured" if gpu.measured else "data sheet x assumed shares; --rates takes measured ones"
    section.add("rates", f"{gpu.matmul_tflops:.3g} TFLOP/s, {gpu.memory_gbs:,.0f} GB/s", origin)
    share = f"{recipe.batch.samples:,} = {plan.micro} x {plan.gpus} x {plan.accumulation}"
    section.add("batch", share, "videos = micro-batch x accelerators x accumulation")
    for part in TIME_PARTS:
        remark = "as far as nothing hides it" if part == "communication" else ""
        section.add(part, f"{getattr(times, part):.3f} s", remark)
    section.add("together", f"{times.total:.3f} s", "roofline: nothing waits, so a real step takes longer")
    sent = plan.traffic
    detail = f"gradients {sent.gradients / 1e9:,.2f}, weights {sent.weights / 1e9:,.2f}"
    section.add("sent by each rank", f"{sent.total / 1e9:,.2f} GB", f"{detail}; {plan.communication_s:.3f} s alone")
    section.add("rate", f"{plan.clips_per_s:,.0f} clips/s", f"{plan.clips_per_s / plan.gpus:,.1f} an accelerator")
    # Publications relate MFU to the data sheet; plan.mfu is relative to the rate that matrix products reach.
    sheet = plan.mfu * gpu.matmul_tflops / gpu.peak_tflops
    section.add("MFU", f"{plan.mfu:.0%} of the matmul rate", f"{sheet:.0%} of {gpu.peak_tflops:g} TFLOP/s")
    return section


def _feeding(recipe: Recipe, plan: Estimate, resources: Resources) -> Section:
    section, need = Section("feeding it"), plan.feeding
    section.add("videos", f"{need.videos_per_s:,.0f} a second", "decoded once, for all their views")
    remark = f"{resources.decode_ms:g} ms a video; {resources.cores:g} there"
    section.add("decoding cores", f"{need.cores:.1f} for each accelerator", remark)
    asked = "one for each core" if recipe.data.workers is None else "data.workers"
    section.add("data workers", f"{need.workers} for each accelerator", asked)
    origin = "from the index" if need.measured_bytes else "assumed, no shards found"
    there = "" if resources.store_gbs is None else f"; {resources.store_gbs:g} GB/s there"
    remark = f"{need.video_bytes / 1e6:.2f} MB a video, {origin}{there}"
    section.add("object store", f"{need.store_gbs:.3f} GB/s", remark)
    return section


def _run(plan: Estimate) -> Section:
    section = Section("the whole recipe")
    # Each node writes its part of a checkpoint, all at the same time.
    nodes = max(1, plan.gpus // plan.gpu.per_node)
    size = plan.checkpoint_bytes
    section.add("checkpoint", f"{size / 1e9:,.1f} GB", f"{size / 1e9 / nodes * WRITE_S_PER_GB:.0f} s at 2 GB/s a node")
    if plan.steps is None or plan.hours is None:
        section.add("hours", "unknown", "a source is missing and has no expected_samples")
        return section
    section.add("steps", f"{plan.steps:,}")
    section.add("hours", f"{plan.hours:,.1f}", f"{plan.hours * plan.gpus:,.0f} accelerator hours")
    return section


def _problems(plan: Estimate) -> Section:
    section = Section("what stands in the way")
    for problem in plan.problems or ["nothing found"]:
        section.add("-", problem)
    return section


def sweep_section(plans: Sequence[Estimate]) -> Section:
    """Make one line for each number of accelerators."""
    section, first = Section("scaling"), plans[0]
    for plan in plans:
        efficiency = plan.clips_per_s / plan.gpus / (first.clips_per_s / first.gpus)
        hours = "" if plan.hours is None else f", {plan.hours:,.1f} h, {plan.hours * plan.gpus:,.0f} accelerator hours"
        remark = f"{efficiency:.0%} of the rate of {first.gpus}; micro {plan.micro} x {plan.accumulation}{hours}"
        rate = f"{plan.times.total:.3f} s, {plan.clips_per_s:,.0f} clips/s"
        section.add(f"{plan.gpus} x {plan.gpu.name}", rate, remark)
    return section


def as_json(plan: Estimate) -> dict[str, Any]:
    """Return a plan for other programs; bytes, seconds, FLOPs."""
    trace = plan.trace
    return {
        "gpus": plan.gpus,
        "gpu": vars(plan.gpu),
        "parameters": plan.parameters,
        "micro": plan.micro,
        "largest_micro": plan.largest_micro,
        "accumulation": plan.accumulation,
        "published_forward_macs": plan.published_macs,
        "clip": {
            part: {"flops": trace.flops(part) / trace.clips, "bytes": trace.bytes(part) / trace.clips}
            for part in trace.parts
        },
        "memory": vars(plan.memory) | {"total": plan.memory.total},
        "traffic": vars(plan.traffic) | {"seconds_alone": plan.communication_s},
        "times": vars(plan.times) | {"total": plan.times.total},
        "clips_per_s": plan.clips_per_s,
        "mfu": plan.mfu,
        "steps": plan.steps,
        "hours": plan.hours,
        "gpu_hours": None if plan.hours is None else plan.hours * plan.gpus,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "feeding": vars(plan.feeding),
        "problems": plan.problems,
    }


def draw(plans: Sequence[Estimate], path: Path) -> None:
    """Draw memory and time of one plan, or of each plan of a sweep, stacked by part; .png, .svg or .pdf.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RecipeError("--plot: needs matplotlib: pip install 'tubelet[plot]'") from error
    # Login nodes have no display, and another back end would look for one.
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    labels = [str(plan.gpus) for plan in plans]
    # p=part: without it all of them would read the last part.
    _stack(left, labels, plans, [(part, lambda plan, p=part: getattr(plan.memory, p) / 1e9) for part in MEMORY_PARTS])
    left.axhline(plans[0].gpu.memory / 1e9, color="black", linestyle=":", label=plans[0].gpu.name)
    left.set(title="memory of one accelerator", ylabel="GB")
    _stack(middle, labels, plans, [(part, lambda plan, p=part: getattr(plan.times, p)) for part in TIME_PARTS])
    middle.set(title="one optimiser step", ylabel="s")
    counts = [plan.gpus for plan in plans]
    right.plot(counts, [plan.clips_per_s for plan in plans], "o-", label="plan")
    ideal = plans[0].clips_per_s / plans[0].gpus
    right.plot(counts, [ideal * count for count in counts], ":", color="black", label="proportional")
    right.set(title="rate", ylabel="clips/s", xlabel="accelerators", xscale="log", yscale="log")
    for axes in (left, middle, right):
        axes.legend(fontsize=8)
    for axes in (left, middle):
        axes.set_xlabel("accelerators")
    figure.savefig(path, dpi=130)


def _stack(axes: Any, labels: list[str], plans: Sequence[Estimate], parts: Sequence[tuple[str, Any]]) -> None:
    bottom = [0.0] * len(plans)
    for name, value in parts:
        heights = [value(plan) for plan in plans]
        axes.bar(labels, heights, bottom=bottom, label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
