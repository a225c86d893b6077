"""Checks across sections: what can't work (problems) and what does nothing (warnings), all in one go."""

import dataclasses
import math
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec

from pretrain.recipe.check_optim import is_changed, optim_problems, optim_warnings, schedule_problems
from pretrain.recipe.schema import Recipe

#: Longest name of a run, bytes: file systems end at 255, and files that are made of it have endings.
MAX_NAME = 200
#: Largest whole number that tensors, generators and files hold; Python's own have no end.
LARGEST_WHOLE = 2**63 - 1
#: Largest whole number in the model section, and of blocks: of a width beyond it one matrix has 10^12 weights, and more
#: blocks than that, which are objects even where they have no memory for weights, fill the memory of any host.
LARGEST_WIDTH, LARGEST_DEPTH = 1 << 20, 10_000
#: Largest batch.micro that is proposed: every number up to it is tried, and no device holds more samples at once.
LARGEST_PROPOSAL = 1 << 16


def check_recipe(recipe: Recipe, ranks: int | None = None) -> list[str]:
    """Say what in the sections of every recipe can't work; methods judge theirs (pretrain/objectives/base.py).

    Args:
        recipe: as `load_recipe` returns it.
        ranks: processes of the run; None: WORLD_SIZE if a launcher set it, else the checks that need it are left out.
    """
    ranks = ranks or _launched_ranks()
    return [
        *_check_name(recipe),
        *_check_upload(recipe),
        *_check_ranges(recipe),
        *_check_sources(recipe),
        *_check_batch(recipe, ranks),
        *_check_fp8(recipe),
        *optim_problems(recipe),
        *schedule_problems(recipe),
    ]


def recipe_warnings(recipe: Recipe) -> list[str]:
    """Name options of the sections of every recipe that have no effect, or that are likely not meant."""
    data, warnings = recipe.data, []
    # An option given at its default can't be told from one that was left out, so only other values are told of.
    if data.cache_dir is None and is_changed(recipe, "data.cache_gb"):
        warnings.append(f"data.cache_gb={data.cache_gb:g} has no effect: data.cache_dir is null")
    warnings += optim_warnings(recipe)
    if recipe.zero.stage == 0 and recipe.zero.offload != "none":
        warnings.append("zero.offload has no effect: zero.stage 0 shards no optimiser; use stage 1 or more")
    if recipe.zero.init == "always" and recipe.zero.stage != 3:
        warnings.append(f"zero.init=always has no effect: zero.stage is {recipe.zero.stage}, and only 3 shards weights")
    if recipe.checkpoint.every_steps is not None and is_changed(recipe, "checkpoint.every_epochs"):
        warnings.append("checkpoint.every_epochs has no effect: checkpoint.every_steps is set")
    if recipe.log.pictures_every_steps == 0 and is_changed(recipe, "log.pictures"):
        warnings.append("log.pictures has no effect: log.pictures_every_steps is 0")
    if recipe.health.shards is None and recipe.health != type(recipe.health)():
        warnings.append("health has no effect: health.shards is null")
    warnings += _guard_warnings(recipe)
    if recipe.batch.samples > 1 and data.workers == 0 and recipe.batch.micro > 8:
        warnings.append("data.workers=0 decodes in the training process: the accelerator waits for every batch")
    ranks = _launched_ranks() or recipe.batch.ranks
    # Lane p mod lanes is one rank's only where the ranks divide the lanes; the order of samples is the same anyway.
    if ranks and data.lanes % ranks:
        warnings.append(
            f"data.lanes={data.lanes} is no multiple of {ranks} ranks: a rank reads from "
            f"{data.lanes // math.gcd(data.lanes, ranks)} lanes' shards, and others read the same"
        )
    return warnings


def _guard_warnings(recipe: Recipe) -> list[str]:
    """List options of policies that neither of the two kinds of bad step has."""
    guard = recipe.guard
    options = {"lower_lr": ("lower_lr_factor", "lower_lr_steps", "max_lowered"), "rewind": ("leave_out", "max_rewinds")}
    return [
        f"guard.{name} has no effect: neither guard.nonfinite nor guard.spike is {policy}"
        for policy, names in options.items()
        for name in names
        if policy not in (guard.nonfinite, guard.spike) and is_changed(recipe, f"guard.{name}")
    ]


def _launched_ranks() -> int | None:
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def _check_name(recipe: Recipe) -> list[str]:
    # Part of the run folder's path, of file names and of wandb's: `../x` would leave runs/.
    name = recipe.run.name
    if name and name.isprintable() and name == name.strip() and not set(name) & set("/\\") and name not in (".", ".."):
        return [] if len(name.encode()) <= MAX_NAME else [f"run.name: {len(name.encode())} bytes, allowed: {MAX_NAME}"]
    return [f"run.name: found {name!r}, allowed: a name without slashes; where the run lies is run.dir"]


def _check_upload(recipe: Recipe) -> list[str]:
    """Check that uploads and run folder are apart: an upload first takes back what lies at its target."""
    upload = recipe.checkpoint.upload
    if upload is None or fsspec.utils.get_protocol(upload) not in ("file", "local"):
        return []
    there, here = (Path(place.removeprefix("file://")).expanduser().resolve() for place in (upload, recipe.run.dir))
    if not (there.is_relative_to(here) or here.is_relative_to(there)):
        return []
    return [
        f"checkpoint.upload: {upload} is, holds or lies in run.dir ({here}), where each upload would destroy the "
        "checkpoint that it copies; name a folder elsewhere, such as one named after the run beside runs/"
    ]


def _check_ranges(recipe: Recipe) -> list[str]:
    """Check numbers that must be positive, or lie in a range."""
    positive = {
        "data": ("lanes", "shuffle_window", "prefetch", "cache_gb", "deadline_s", "epoch_samples"),
        "batch": ("samples", "micro", "ranks"),
        "optim": ("base_lr", "base_batch", "eps", "trust", "clip_grad"),
        "schedule": ("epochs", "steps", "gamma", "max_steps"),
        "checkpoint": ("every_steps", "every_epochs", "keep_last", "keep_every_epochs"),
        "zero": ("bucket_mb",),
        "log": ("every_steps", "pictures", "peak_tflops"),
        "guard": ("window", "z", "lower_lr_factor", "lower_lr_steps", "leave_out"),
        "watchdog": ("factor", "least_s", "long_s", "stop_after_s", "leave_s", "join_s", "beat_s"),
        "health": ("every_epochs", "neighbours"),
        "run": ("time_limit_minutes",),
    }  # fmt: skip
    not_negative = {
        "data": ("workers", "readahead", "bad_rate", "bad_minimum", "bad_attempts"),
        "optim": ("base_min_lr", "base_warmup_lr", "weight_decay", "weight_decay_end"),
        "schedule": ("decay_from_epoch", "lag", "warmup_epochs", "warmup_steps"),
        "guard": ("max_skips", "max_lowered", "max_rewinds"),
        "watchdog": ("max_restarts",),
        "log": ("pictures_every_steps",),
        "run": ("seed",),
    }
    problems = []
    for allowed, keys in (("more than 0", positive), ("0 or more", not_negative)):
        for section, names in keys.items():
            for name in names:
                value = getattr(getattr(recipe, section), name)
                if value is not None and (value < 0 or (value == 0 and keys is positive)):
                    problems.append(f"{section}.{name}: found {value}, allowed: {allowed}")
    if recipe.compute.activation_checkpointing not in (True, False, "selective"):
        found = recipe.compute.activation_checkpointing
        problems.append(f"compute.activation_checkpointing: found {found}, allowed: true, false, selective")
    if recipe.compute.compile and recipe.compute.activation_checkpointing == "selective":
        # torch picks what to keep from a block's operations one by one, and a compiled block shows it none.
        problems.append(
            "compute.activation_checkpointing: found selective with compute.compile, whose blocks would be recomputed "
            "as a whole; allowed: true, false, or compute.compile=false"
        )
    if recipe.zero.stage not in (0, 1, 2, 3):
        problems.append(f"zero.stage: found {recipe.zero.stage}, allowed: 0, 1, 2 or 3")
    if recipe.data.bad_rate > 1:
        problems.append(f"data.bad_rate: found {recipe.data.bad_rate}, allowed: a share from 0 to 1")
    return problems


def _check_fp8(recipe: Recipe) -> list[str]:
    """List what FP8 does not go with."""
    compute = recipe.compute
    if compute.fp8 == "none":
        return []
    beside = []
    if compute.dtype != "bf16":
        beside.append(f"compute.dtype={compute.dtype}, allowed: bf16, which sums and weights stay in")
    if not compute.compile:
        # By themselves, casts and the search for the largest value read and write every activation once more.
        beside.append("compute.compile=false, allowed: true, else casting takes more time than products save")
    if recipe.zero.stage == 3:
        # The product keeps the gathered weight for its backward pass, and nothing would be sharded.
        beside.append("zero.stage=3, allowed: 0, 1 or 2")
    return [f"compute.fp8: found {compute.fp8} with {found}" for found in beside]


def unusable_numbers(recipe: Recipe) -> list[str]:
    """Find NaN, infinity and whole numbers beyond 64 bits in any section, before anything computes with them.

    Comparisons with NaN are false, so no range would refuse it; a whole number without end passes every range, and
    loops up to it do not return.
    """
    found = (_numbers(value, name) for name, value in vars(recipe).items())
    problems = []
    for key, number in chain.from_iterable(found):
        if isinstance(number, int):
            if abs(number) > LARGEST_WHOLE:
                # Not the number itself: Python refuses to write more than 4,300 digits.
                found_bits = f"a whole number of {number.bit_length()} bits"
                problems.append(f"{key}: found {found_bits}, allowed: at most 63, up to {LARGEST_WHOLE}")
        elif not math.isfinite(number):
            problems.append(f"{key}: found {number}, allowed: a finite number")
    return problems


def oversized_model(recipe: Recipe) -> list[str]:
    """Find sizes in the model section that no host could build or count, before one is killed for trying."""
    problems = []
    for key, number in _numbers(recipe.model, "model"):
        most = LARGEST_DEPTH if "depth" in key.rpartition(".")[2] else LARGEST_WIDTH
        if isinstance(number, int) and number > most:
            problems.append(f"{key}: found {number}, allowed: up to {most}")
    return problems


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int | float]]:
    """Yield every number at or below a key of the recipe, in sections, named entries and lists."""
    if isinstance(value, int | float):
        yield key, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item, key)
    elif isinstance(value, dict) or dataclasses.is_dataclass(value):
        for name, item in (value if isinstance(value, dict) else vars(value)).items():
            yield from _numbers(item, f"{key}.{name}")


def _check_sources(recipe: Recipe) -> list[str]:
    sources, problems = recipe.data.sources, []
    if not sources:
        problems.append(
            "data.sources: none; name at least one: data.sources.mine.shards=FOLDER (packed by launch/pack.py)"
        )
    weighted = [name for name, source in sources.items() if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        bare = ", ".join(name for name in sources if name not in weighted)
        problems.append(
            f"data.sources: {', '.join(weighted)} have a weight and {bare} have none; "
            "give every source one, or none (then each counts by its size)"
        )
    if weighted and recipe.data.compose != "mixed":
        problems.append(
            f"data.compose: {recipe.data.compose} shows every source equally often, and {', '.join(weighted)} have a "
            "weight; leave weights out, or set data.compose=mixed"
        )
    if len(sources) == 1 and recipe.data.compose != "mixed":
        problems.append(f"data.compose: {recipe.data.compose} needs two sources or more, found one")
    for name, source in sources.items():
        if source.weight is not None and source.weight <= 0:
            problems.append(
                f"data.sources.{name}.weight: found {source.weight:g}, allowed: more than 0; "
                f"leave the source out with data.sources.{name}=null"
            )
        if source.stride is not None and source.stride < 1:
            problems.append(f"data.sources.{name}.stride: found {source.stride}, allowed: 1 or more frames")
    return problems


def _check_batch(recipe: Recipe, ranks: int | None) -> list[str]:
    samples, micro, problems = recipe.batch.samples, recipe.batch.micro, []
    if min(samples, micro) < 1:
        return []  # reported as out of range
    known = [("ranks were launched", ranks)] if ranks else [("is batch.ranks", recipe.batch.ranks)]
    for origin, count in known:
        if count and samples % (micro * count):
            share = samples // count if samples % count == 0 else 0
            fitting = [m for m in range(1, min(share, LARGEST_PROPOSAL) + 1) if share % m == 0]
            near = min(fitting, key=lambda m: abs(m - micro), default=None)
            fix = f"batch.micro={near} fits" if near else f"batch.samples must be a multiple of {count}"
            problems.append(
                f"batch.samples: {samples} is no multiple of batch.micro x ranks = {micro} x {count} "
                f"({count} {origin}); {fix}"
            )
    if samples % micro:
        problems.append(f"batch.micro: found {micro}, allowed: a divisor of batch.samples = {samples}")
    epoch = recipe.data.epoch_samples
    turns = len(recipe.data.sources) if recipe.data.compose == "alternate" else 1
    if epoch is not None and 0 < epoch < samples * turns:
        step = f"one step of batch.samples = {samples}" + (f" of each of {turns} sources" if turns > 1 else "")
        problems.append(f"data.epoch_samples: {epoch} videos are less than {step}")
    return problems
