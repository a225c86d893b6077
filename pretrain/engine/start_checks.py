"""Checks of all hosts at every start: limits, versions, recipe, clocks; seconds, and nothing is written.

Every rank examines its own host; what they found is gathered and told once, with the hosts that differ named.
"""

import hashlib
import json
import logging
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.same_run import differences, flat
from pretrain.data.index import describe_unhashed
from pretrain.data.stream_plan import OpenSource
from pretrain.engine.build import count_model
from pretrain.engine.demand import Demand
from pretrain.engine.model_states import checkpoint_bytes
from pretrain.errors import TrainingError
from pretrain.objectives.base import Method
from pretrain.recipe.schema import Recipe
from pretrain.runtime import host_checks, storage
from pretrain.runtime.environment import code_hash, versions
from pretrain.runtime.findings import Finding, Line, merge, odd_ones
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)

#: The check of the program's own files.
CODE = "files of pretrain/ and finetune/"

#: Packages that must be the same everywhere; another version of the others is a warning.
ESSENTIAL = ("python", "torch", "deepspeed", "cuda")

#: Clocks that are apart by more than this are a warning, and a failure: object stores refuse signatures 15 min off.
SKEW_S, REFUSED_SKEW_S = 2.0, 600.0

#: Keys that may differ from host to host: where things lie.
PLACES = (
    *("data.root", "data.cache_dir", "health.shards", "run.init_weights"),
    *("objective.teacher.weights", "objective.held_out.shards"),
)


def examine_start(method: Method, ranks: Ranks, demand: Demand) -> list[Line]:
    """Make the checks of every start: seconds, and nothing is written."""
    hosts = gather_objects(ranks, platform.node())
    limits = check_limits(method, ranks, demand)
    findings = [*limits, *check_same_everywhere(method.recipe, ranks), check_clock(ranks)]
    return merge(gather_objects(ranks, findings), hosts)


def check_hosts(method: Method, ranks: Ranks, demand: Demand) -> None:
    """Make the checks of a start: warn of what is odd, refuse what would end or spoil the run.

    Args:
        method: The run.
        ranks: This process among all.
        demand: What its data workers take.

    Raises:
        TrainingError: some check failed; all of them are in the message.
    """
    _judge(examine_start(method, ranks, demand), ranks)


def check_data(fingerprints: Mapping[str, str], ranks: Ranks) -> None:
    """Refuse ranks that opened different data: each would train on its own, to the end and without an error.

    Args:
        fingerprints: Of the data that this rank opened, by source.
        ranks: This process among all.

    Raises:
        TrainingError: some rank has other data than most; its host is named.
    """
    hosts, found = gather_objects(ranks, platform.node()), gather_objects(ranks, dict(fingerprints))
    advice = "copy it there again, or name one place that all hosts share (launch/pack.py --check finds what differs)"
    findings = []
    for name in fingerprints:  # the recipe names the sources, and recipes have been compared
        usual, odd = odd_ones([one[name] for one in found])
        value = f"fingerprint {fingerprints[name]} instead of {usual}"
        findings.append(Finding(f"data of {name}", "fail" if ranks.rank in odd else "ok", value, advice))
    _judge(merge(gather_objects(ranks, findings), hosts), ranks)


def tell_unhashed(sources: Iterable[OpenSource], ranks: Ranks) -> None:
    """Warn, on one rank, of indexes from before the hashes of member tables."""
    for url in sorted({source.index.url for source in sources if not source.index.is_hashed}):
        if ranks.first:
            logger.warning(describe_unhashed(url))


def _judge(lines: list[Line], ranks: Ranks) -> None:
    for line in lines:
        if ranks.first and line.status == "warn":
            logger.warning("%s", line)
    failed = [str(line) for line in lines if line.status == "fail"]
    if failed:
        more = "launch/doctor.py with the same recipe examines all hosts closely"
        raise TrainingError("\n  - ".join([f"{len(failed)} checks of the hosts failed ({more}):", *failed]))


def check_limits(method: Method, ranks: Ranks, demand: Demand) -> Iterator[Finding]:
    """Check this host's limits against what the run will ask of it."""
    recipe = method.recipe
    yield host_checks.check_descriptors(demand.workers, recipe.data.prefetch)
    yield host_checks.check_temporary_folder(demand.workers)
    yield host_checks.check_address_space()
    yield host_checks.check_shared_memory(demand.workers, demand.bytes_each)
    if ranks.first and storage.is_local(recipe.run.dir):
        size, kept = checkpoint_bytes(recipe, count_model(method)), recipe.checkpoint.keep_last
        yield host_checks.check_disk_space(Path(recipe.run.dir).absolute(), size, kept)


def check_same_everywhere(recipe: Recipe, ranks: Ranks) -> Iterator[Finding]:
    """Compare versions, the program's files and the recipe with those of most ranks."""
    own = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda or "none")} | versions()
    found = gather_objects(ranks, own)
    for name in sorted({name for one in found for name in one}):
        essential = name in ESSENTIAL
        finding = compare([one.get(name, "not installed") for one in found], ranks.rank, name, essential)
        if finding.status != "ok" or essential:
            yield finding
    yield compare(gather_objects(ranks, code_hash()), ranks.rank, CODE, essential=True)
    yield _compare_recipes(gather_objects(ranks, _comparable(recipe)), ranks.rank)


def compare(values: list[str], rank: int, name: str, essential: bool) -> Finding:
    usual, odd = odd_ones(values)
    if rank not in odd:
        return Finding(name, "ok", usual)
    advice = f"the other ranks have {usual}; install the same on all hosts"
    return Finding(name, "fail" if essential else "warn", values[rank], advice)


def _compare_recipes(recipes: list[dict[str, Any]], rank: int) -> Finding:
    hashes = [recipe_hash(recipe) for recipe in recipes]
    usual, odd = odd_ones(hashes)
    if rank not in odd:
        return Finding("recipe", "ok", usual)
    found = differences(recipes[hashes.index(usual)], recipes[rank])
    keys = ", ".join(f"{key}: {here!r} instead of {there!r}" for key, (there, here) in list(found.items())[:5])
    return Finding("recipe", "fail", f"{hashes[rank]}, {keys}", "start the same recipe with the same overrides")


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """Drop from the recipe what may differ from host to host."""
    items = flat(asdict(recipe))

    def is_place(key: str) -> bool:
        return key in PLACES or (key.startswith("data.sources.") and key.endswith((".shards", ".val", ".test")))

    return {key: value for key, value in items.items() if not is_place(key)}


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Compute sixteen digits that tell recipes apart."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_clock(ranks: Ranks) -> Finding:
    """Compare this host's clock with the median of all, read right after a barrier."""
    best = float("inf")
    # The best of three: a process that is woken late after the barrier seems to have a clock that is ahead.
    for _ in range(3):
        if ranks.world_size > 1:
            dist.barrier()
        clocks = gather_objects(ranks, time.time())
        # The median: one host that is far off must not make all others look wrong.
        skew = clocks[ranks.rank] - sorted(clocks)[len(clocks) // 2]
        best = min(best, skew, key=abs)
    return judge_clock(best)


def judge_clock(skew_s: float) -> Finding:
    """Judge a clock that differs by so much."""
    value, advice = f"{skew_s:+.1f} s", "start a time service (chrony, ntpd)"
    if abs(skew_s) <= SKEW_S:
        return Finding("clock", "ok", f"within {SKEW_S:g} s")
    return Finding("clock", "fail" if abs(skew_s) > REFUSED_SKEW_S else "warn", value, advice)
