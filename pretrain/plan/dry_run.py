"""Everything up to the first step, without an accelerator: what a recipe builds, costs, reads and needs.

The model is built on the meta device, so a billion parameters take seconds and no memory.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from pretrain.data.compose import shares
from pretrain.data.index import ShardIndex
from pretrain.data.order import SourceShape
from pretrain.engine.build import build_on_meta, open_cache
from pretrain.engine.deepspeed_config import builds_sharded, deepspeed_config
from pretrain.engine.model_states import ModelSize, checkpoint_bytes, checkpoint_width, model_states, size_of
from pretrain.engine.schedules import Schedule, build_schedule, every_steps
from pretrain.errors import StorageError, TubeletError
from pretrain.models.base import MODEL
from pretrain.objectives.base import Method, Objective
from pretrain.plan.indices import epoch_of, find_indices, source_size
from pretrain.recipe.rates import actual_rates, rate_scales
from pretrain.recipe.schema import Recipe, Source
from pretrain.runtime.cores import usable_cores
from pretrain.runtime.dtypes import DTYPES
from pretrain.runtime.process_group import present_ranks

#: A forward pass costs one, a backward pass two of it; recomputing activations adds another.
BACKWARD_COST = 2


@dataclass
class Section:
    """A table of the report: rows of name, value and remark."""

    title: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, name: str, value: str, remark: str = "") -> None:
        """Append a row."""
        self.rows.append((name, value, remark))


@dataclass(frozen=True)
class RunOutline:
    """Numbers that several sections share."""

    ranks: int
    ranks_from: str
    accumulation: int
    cached: bool
    """whether micro-batches are embedded once more, for a loss over the global batch"""
    size: ModelSize
    epoch_videos: int | None
    schedule: Schedule | None


def dry_run(method: Method) -> list[Section]:
    """Make the report, section by section.

    Missing data is reported, not raised: a published recipe is looked at before its data is there. Where all sources
    are there, what the start of training would find wrong with them is reported in the same way.
    """
    recipe = method.recipe
    objective = build_on_meta(method)
    data, indices = _data_section(recipe)
    if None not in indices.values():
        data.rows += _start_rows(method, objective)
    plan = _plan(recipe, objective, indices)
    return [
        _model_section(objective, plan),
        _cost_section(method),
        data,
        _batch_section(method, plan),
        _learning_rate_section(recipe),
        _schedule_section(recipe, plan),
        _memory_section(recipe, plan),
        _deepspeed_section(recipe, plan),
        _checkpoint_section(recipe, plan),
    ]


def _plan(recipe: Recipe, objective: Objective, indices: dict[str, ShardIndex | None]) -> RunOutline:
    # Launched: the numbers are those of this very start, whatever the recipe was published with.
    if "WORLD_SIZE" in os.environ:
        ranks, origin = int(os.environ["WORLD_SIZE"]), "launched"
    elif recipe.batch.ranks:
        ranks, origin = recipe.batch.ranks, "batch.ranks, the published run"
    else:
        ranks, origin = 1, "nothing launched, batch.ranks is null"
    epoch = epoch_of(recipe, indices)
    schedule = build_schedule(recipe, epoch[1], epoch[0]) if epoch is not None else None
    accumulation = recipe.batch.samples // (recipe.batch.micro * ranks)  # whole: check_recipe has seen to it
    cached = open_cache(objective, accumulation) is not None
    return RunOutline(ranks, origin, accumulation, cached, size_of(objective), epoch[0] if epoch else None, schedule)


def _model_section(objective: Objective, plan: RunOutline) -> Section:
    section = Section("model")
    total, trained = plan.size.parameters, plan.size.trained
    section.add("parameters", f"{total:,}", type(objective.model).__name__)
    if trained < total:
        section.add("  trained", f"{trained:,}", f"{trained / total:.2%}; the others are frozen")
    for name, count in _parts(objective.model):
        section.add(f"  {name}", f"{count:,}")
    for name, count in _parts(objective):
        if name != MODEL:
            section.add(f"  {name}", f"{count:,}", "beside the model")
    return section


def _parts(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the parameters of each child, where it has any, and the module's own."""
    for name, child in module.named_children():
        if count := sum(parameter.numel() for parameter in child.parameters()):
            yield name, count
    for name, parameter in module.named_parameters(recurse=False):
        yield name, parameter.numel()


def _cost_section(method: Method) -> Section:
    section, cost = Section(f"one {method.recipe.input.name}"), method.cost()
    section.rows += method.recipe.input.describe()
    for name, value in cost.tokens.items():
        section.add(f"{name} tokens", f"{value:,}")
    section.add("forward pass", _macs(cost.published), "as publications count; parts `skipped` are not executed")
    for name, macs in cost.macs.items():
        section.add(f"  {name}", _macs(macs))
    return section


def _data_section(recipe: Recipe) -> tuple[Section, dict[str, ShardIndex | None]]:
    section = Section("data")
    indices, errors = find_indices(recipe)
    unusable: list[tuple[str, str]] = []
    for name, error in errors.items():
        unread = isinstance(error.__cause__, StorageError)
        absent = unread and "FileNotFoundError" in str(error)
        place = recipe.data.sources[name].shards
        # Only what a store said stands by itself; a damaged entry's cause says neither which file it is nor what to do.
        told = str(error.__cause__ if unread else error)
        unusable.append((f"  {name}", f"no index.json in {place}" if absent else told))
    for name, share in _shares(recipe, indices).items():
        section.add(name, _found(recipe.data.sources[name], indices[name]), share)
    section.add("data workers", *_workers(recipe))
    if unusable:
        section.add("MISSING", f"{len(unusable)} of {len(indices)}", "training needs every source")
        section.rows += [(name, problem, "") for name, problem in unusable]
        section.add(
            "  to pack videos", f"python launch/pack.py VIDEOS {next(iter(recipe.data.sources.values())).shards}"
        )
        section.add("  if they lie elsewhere", "data.root=FOLDER_OR_URL, or TUBELET_DATA in the environment")
        section.add("  to do without one", f"data.sources.{unusable[-1][0].strip()}=null")
    return section, indices


def _start_rows(method: Method, objective: Objective) -> list[tuple[str, str, str]]:
    """Do with the data what the start of a run does: tell what it would tell, or why it would end."""
    from pretrain.engine.health import open_health  # it reads samples, for which webdataset takes a second

    alone = present_ranks(torch.device("cpu"))
    try:
        report = method.data_report()
        method.evaluation(alone)
        open_health(method, alone, objective)
    except TubeletError as error:
        reasons = str(error).splitlines()
        return [("REFUSED", "training would not start", ""), *(("", line, "") for line in reasons)]
    return [("looked at", line, "") for line in report]


def _workers(recipe: Recipe) -> tuple[str, str]:
    """Say how many data workers a rank has, and why."""
    if recipe.data.workers is not None:
        return f"{recipe.data.workers} for each rank", "data.workers"
    return "one for each core", f"that falls to a rank, as /dev/shm has room; {usable_cores()} cores on this host"


def _found(source: Source, index: ShardIndex | None) -> str:
    if index is None:
        expected = f", {source.expected_samples:,} videos expected" if source.expected_samples else ""
        return f"not there{expected}"
    size = sum(shard.bytes for shard in index.shards)
    text = f"{index.samples:,} videos in {len(index.shards):,} shards, {_gigabytes(size)}, {index.fingerprint}"
    if source.expected_samples and source.expected_samples != index.samples:
        text += f" ({source.expected_samples:,} expected)"
    return text


def _shares(recipe: Recipe, indices: dict[str, ShardIndex | None]) -> dict[str, str]:
    """Describe what each source gives to an epoch, in words."""
    sources = recipe.data.sources
    sizes = {name: source_size(source, indices[name]) for name, source in sources.items()}
    remarks = {name: recipe.input.describe_source(source) for name, source in sources.items()}
    if not all(sizes.values()):
        return remarks
    # One shard as large as its source: quotas depend on sizes alone, and no index need be there.
    shapes = [
        SourceShape(name, np.array([sizes[name]], dtype=np.int64), source.weight) for name, source in sources.items()
    ]
    quotas = shares(recipe.data, shapes)
    parts = {
        shape.name: f"{quota:,} an epoch ({quota / sum(quotas):.1%}, {quota / shape.samples:.2f} passes)"
        for shape, quota in zip(shapes, quotas, strict=True)
    }
    return {name: ", ".join(filter(None, (part, remarks[name]))) for name, part in parts.items()}


def _batch_section(method: Method, plan: RunOutline) -> Section:
    recipe = method.recipe
    section, batch, views = Section("one optimiser step"), recipe.batch, recipe.input.views
    section.add("videos", f"{batch.samples:,}", "batch.samples, over all ranks")
    section.add("clips", f"{batch.samples * views:,}", f"{batch.samples:,} videos x {views} views")
    section.add("ranks", f"{plan.ranks}", plan.ranks_from)
    section.add(
        "accumulation",
        f"{plan.accumulation}",
        f"{batch.samples:,} / ({batch.micro} micro x {plan.ranks} ranks); {batch.micro * views} clips a forward pass",
    )
    macs = method.cost().executed
    # `selective` recomputes no matrix product, and nothing else is counted.
    passes = 1 + BACKWARD_COST + int(recipe.compute.activation_checkpointing is True) + int(plan.cached)
    section.add(
        "work",
        _flops(2 * macs * passes * batch.samples * views),
        f"2 x {_macs(macs)} executed x {passes} passes x {batch.samples * views:,} clips",
    )
    return section


def _learning_rate_section(recipe: Recipe) -> Section:
    section, optim, samples = Section("learning rate"), recipe.optim, recipe.batch.samples
    rates = actual_rates(recipe)
    rows = [("peak", "base_lr", rates.peak)]
    if rates.warmup_start:
        rows.append(("warm-up from", "base_warmup_lr", rates.warmup_start))
    if recipe.schedule.shape in ("cosine", "linear"):
        rows.append(("end", "base_min_lr", rates.floor))
    for name, key, value in rows:
        base = getattr(optim, key)
        formula = f"{base:g} x {samples:,} videos / {optim.base_batch}"
        section.add(name, f"{value:.4g}", formula if rate_scales(optim, key) else "not scaled with the batch")
    if recipe.input.views > 1:
        section.add("views", "not counted", "the official scaling counts videos, not clips")
    return section


def _schedule_section(recipe: Recipe, plan: RunOutline) -> Section:
    section, views, asked = Section("schedule"), recipe.input.views, recipe.schedule
    effective = f"{asked.epochs * views:g} effective, with {views} views" if views > 1 else ""
    if asked.steps is None:
        section.add("epochs", f"{asked.epochs:g}", effective)
    if plan.schedule is None:
        section.add("steps", "unknown", "a source is missing and has no expected_samples")
        return section
    schedule = plan.schedule
    section.add("videos an epoch", f"{plan.epoch_videos:,}", f"a multiple of data.lanes = {recipe.data.lanes}")
    section.add("steps an epoch", f"{schedule.steps_per_epoch:,}")
    section.add(
        "steps", f"{schedule.total:,}", "" if asked.steps is None else f"{schedule.epoch(asked.steps):g} epochs"
    )
    section.add("warm-up steps", f"{schedule.warmup:,}", f"linear from {schedule.warmup_start:.4g}")
    section.add("shape", schedule.shape, _shape_remark(schedule))
    if schedule.last < schedule.total:
        section.add("stops after", f"{schedule.last:,} steps", "schedule.max_steps")
    for step in _marks(schedule):
        section.add(f"  learning rate at step {step:,}", f"{schedule.lr(step):.4g}")
    if schedule.weight_decay_ends is not None:
        for step in sorted({*(schedule.total * part // 4 for part in range(4)), schedule.total - 1}):
            section.add(f"  weight decay at step {step:,}", f"{schedule.weight_decay(step):.4g}")
    section.add("hours", "unknown", "needs a measured rate: the console of a short run shows it")
    return section


def _shape_remark(schedule: Schedule) -> str:
    """Describe how the learning rate goes on after the warm-up, in words and numbers."""
    words = []
    if schedule.milestones:
        at = ", ".join(f"{step:,}" for step in schedule.milestones)
        words.append(f"x {schedule.gamma:g} at steps {at}")
    if schedule.decay_from is not None and schedule.shape in ("cosine", "linear"):
        words.append(f"begins at step {schedule.decay_from:,}")
    if schedule.hold > 1:
        words.append("changes with each epoch")
    if schedule.lag:
        words.append(f"{schedule.lag // schedule.hold} {'epoch' if schedule.hold > 1 else 'step'}(s) late")
    return "; ".join(words)


def _marks(schedule: Schedule) -> list[int]:
    """List steps that show the shape: first, middle and end of the warm-up, quarters of the decay, milestones, last."""
    begin = max(schedule.warmup, schedule.decay_from or 0)
    quarters = [begin + (schedule.total - begin) * part // 4 for part in range(4)]
    drops = [step for milestone in schedule.milestones for step in (milestone - 1, milestone)]
    marks = {0, schedule.warmup // 2, schedule.warmup, *(drops or quarters), schedule.total - 1}
    return sorted(step for step in marks if step < schedule.total)


def _memory_section(recipe: Recipe, plan: RunOutline) -> Section:
    """List what a rank holds of the model, and of frozen towers beside it."""
    section = Section(f"memory of one rank (ZeRO {recipe.zero.stage}, {recipe.compute.dtype})")
    parts = model_states(recipe, plan.size, plan.ranks)
    for part in parts:
        section.add(part.name, _gigabytes(part.size), part.remark)
    together = sum(part.size for part in parts if not part.host)
    section.add("together", _gigabytes(together), "activations and communication buckets come on top")
    return section


def _deepspeed_section(recipe: Recipe, plan: RunOutline) -> Section:
    """Show the configuration that DeepSpeed gets where there are accelerators."""
    section = Section("deepspeed.initialize")
    # As on the machines that will train, not as on the one that plans, which may have no accelerator.
    config = deepspeed_config(recipe, accumulation=plan.accumulation, parameters=plan.size.parameters, on_cpu=False)
    for key, value in config.items():
        section.add(key, json.dumps(value))
    sharded = builds_sharded(recipe, plan.size.parameters)
    section.add(
        "model built in", "deepspeed.zero.Init" if sharded else "each rank whole", f"zero.init={recipe.zero.init}"
    )
    return section


def _checkpoint_section(recipe: Recipe, plan: RunOutline) -> Section:
    section, checkpoint = Section("checkpoints"), recipe.checkpoint
    section.add("folder", f"{recipe.run.dir}/checkpoints")
    steps = f"{every_steps(recipe, plan.schedule):,} steps" if plan.schedule else "steps of an epoch unknown"
    section.add("every", steps, f"{checkpoint.every_epochs:g} epochs" if checkpoint.every_steps is None else "")
    weights = DTYPES[recipe.compute.dtype].itemsize
    frozen = f", {weights} a frozen one" if plan.size.trained < plan.size.parameters else ""
    remark = f"{checkpoint_width(recipe)} bytes a parameter{frozen}"
    section.add("size", f"about {_gigabytes(checkpoint_bytes(recipe, plan.size))}", remark)
    kept, period = "", checkpoint.keep_every_epochs
    if period:
        # schedule.steps says the length instead of schedule.epochs, which then is only the default.
        epochs = plan.schedule.epoch(plan.schedule.total) if plan.schedule else recipe.schedule.epochs
        kept = f"and one every {period:g} epochs for good: {int(epochs / period)}"
    section.add("kept", f"the last {checkpoint.keep_last}", kept)
    return section


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _macs(count: float) -> str:
    return f"{count / 1e9:.1f} GMAC" if count >= 1e9 else f"{count / 1e6:.1f} MMAC"


def _flops(count: float) -> str:
    return f"{count / 1e15:,.1f} PFLOP" if count >= 1e14 else f"{count / 1e9:,.1f} GFLOP"
