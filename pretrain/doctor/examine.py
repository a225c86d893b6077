"""Checks of all hosts of a run: the cheap ones at every start, all of them by launch/doctor.py.

Every rank examines its own host; what they found is gathered and told once, with the hosts that differ named.
"""

import functools
import hashlib
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpoint.same_run import differences, flat
from pretrain.data.decoders import open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.members import parse_sample
from pretrain.data.stream_plan import OpenSource, open_sources
from pretrain.doctor.links import check_links
from pretrain.engine.build import count_model
from pretrain.engine.deepspeed_config import DTYPES
from pretrain.engine.model_states import checkpoint_bytes
from pretrain.errors import TrainingError
from pretrain.recipe.schema import Recipe
from pretrain.runtime import host_checks, storage
from pretrain.runtime.environment import commit, versions
from pretrain.runtime.findings import Finding, Line, Status, attempt, merge, odd_ones
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)

#: Packages that must be the same everywhere; another version of the others is a warning.
ESSENTIAL = ("python", "torch", "deepspeed", "cuda")

#: Clocks that are apart by more than this are a warning, and a failure: object stores refuse signatures 15 min off.
SKEW_S, REFUSED_SKEW_S = 2.0, 600.0

#: Keys that may differ from host to host: where things lie.
PLACES = ("data.root", "data.cache_dir", "health.shards", "run.init_weights")

#: A host that computes at less than this share of what the usual one does slows all of them down.
SLOW = 0.7

#: Bytes read from each source to measure it.
READ_BYTES = 32 << 20


def examine_start(recipe: Recipe, ranks: Ranks) -> list[Line]:
    """The checks that every start makes: seconds, and nothing is written."""
    hosts = gather_objects(ranks, platform.node())
    findings = [*_own_limits(recipe, hosts, ranks), *_same_everywhere(recipe, ranks), check_clock(ranks)]
    return merge(gather_objects(ranks, findings), hosts)


def examine(recipe: Recipe, ranks: Ranks) -> list[Line]:
    """All checks of all hosts; the same lines on every rank."""
    hosts = gather_objects(ranks, platform.node())
    findings = [
        *_own_limits(recipe, hosts, ranks),
        *_same_everywhere(recipe, ranks),
        _compared(gather_objects(ranks, commit() or "no git checkout"), ranks.rank, "commit", essential=True),
        check_clock(ranks),
        *_device(recipe, ranks),
        *check_links(ranks, hosts),
    ]
    if hosts.index(hosts[ranks.rank]) == ranks.rank:  # one rank of each host is enough for what its ranks share
        findings += _storage(recipe, ranks)
    dist.barrier()
    return merge(gather_objects(ranks, findings), hosts)


def check_hosts(recipe: Recipe, ranks: Ranks) -> None:
    """Make the checks of a start: warn of what is odd, refuse what would end or spoil the run.

    Raises:
        TrainingError: some check failed; all of them are in the message.
    """
    lines = examine_start(recipe, ranks)
    for line in lines:
        if ranks.first and line.status == "warn":
            logger.warning("%s", line)
    failed = [str(line) for line in lines if line.status == "fail"]
    if failed:
        more = "launch/doctor.py with the same recipe examines all hosts closely"
        raise TrainingError("\n  - ".join([f"{len(failed)} checks of the hosts failed ({more}):", *failed]))


def _own_limits(recipe: Recipe, hosts: list[str], ranks: Ranks) -> Iterator[Finding]:
    data = recipe.data
    yield host_checks.check_descriptors(data.workers, data.prefetch)
    local_ranks = hosts.count(hosts[ranks.rank])
    batch = recipe.batch.micro * data.views * data.frames * data.height * data.width * 3
    yield host_checks.check_shared_memory(local_ranks * data.workers * data.prefetch * batch)
    if ranks.first and storage.is_local(recipe.run.dir):
        size, kept = checkpoint_bytes(recipe, count_model(recipe)), recipe.checkpoint.keep_last
        yield host_checks.check_disk_space(Path(recipe.run.dir).absolute(), size, kept)


def _same_everywhere(recipe: Recipe, ranks: Ranks) -> Iterator[Finding]:
    """Versions and the recipe, compared with those of most ranks."""
    own = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda or "none")} | versions()
    found = gather_objects(ranks, own)
    for name in sorted({name for one in found for name in one}):
        essential = name in ESSENTIAL
        finding = _compared([one.get(name, "not installed") for one in found], ranks.rank, name, essential)
        if finding.status != "ok" or essential:
            yield finding
    yield _compare_recipes(gather_objects(ranks, _comparable(recipe)), ranks.rank)


def _compared(values: list[str], rank: int, name: str, essential: bool) -> Finding:
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
    """The recipe without what may differ from host to host."""
    items = flat(asdict(recipe))

    def is_place(key: str) -> bool:
        return key in PLACES or (key.startswith("data.sources.") and key.endswith((".shards", ".val", ".test")))

    return {key: value for key, value in items.items() if not is_place(key)}


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Sixteen digits that tell recipes apart."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_clock(ranks: Ranks) -> Finding:
    """This host's clock against the median of all, read right after a barrier."""
    best = float("inf")
    for _ in range(3):
        if ranks.world_size > 1:
            dist.barrier()
        clocks = gather_objects(ranks, time.time())
        skew = clocks[ranks.rank] - sorted(clocks)[len(clocks) // 2]
        best = min(best, skew, key=abs)
    return judge_clock(best)


def judge_clock(skew_s: float) -> Finding:
    """What to think of a clock that differs by so much."""
    value, advice = f"{skew_s:+.1f} s", "start a time service (chrony, ntpd)"
    if abs(skew_s) <= SKEW_S:
        return Finding("clock", "ok", f"within {SKEW_S:g} s")
    return Finding("clock", "fail" if abs(skew_s) > REFUSED_SKEW_S else "warn", value, advice)


def _device(recipe: Recipe, ranks: Ranks) -> Iterator[Finding]:
    device = ranks.device
    yield attempt("arithmetic", lambda: host_checks.check_arithmetic(device), "look at the driver's log (dmesg)")
    yield attempt("memory", lambda: host_checks.check_memory(device), "see what else uses this device's memory")
    rates = gather_objects(ranks, host_checks.measure_matmul(device, DTYPES[recipe.compute.dtype]))
    usual, own = sorted(rates)[len(rates) // 2], rates[ranks.rank]
    status: Status = "ok" if own >= SLOW * usual else "warn"
    value = f"{own:.2f} TFLOP/s, the usual rank {usual:.2f}"
    yield Finding("matrix products", status, value, "" if status == "ok" else "look for heat, power caps, other jobs")


def _storage(recipe: Recipe, ranks: Ranks) -> Iterator[Finding]:
    root = recipe.run.dir
    if storage.is_local(root):
        folder = Path(root).absolute()
        advice = "run.dir must be writable from every host: mount it, or change its permissions"
        yield attempt("run folder", lambda: host_checks.check_disk_rate(folder, f"rank_{ranks.rank}"), advice)
    for name, source in recipe.data.sources.items():
        yield attempt(
            f"source {name}",
            functools.partial(_check_source, recipe, name),
            f"look at data.sources.{name}.shards = {source.shards}: path, credentials, network",
        )
        yield attempt(
            f"decoder, {name}",
            functools.partial(_check_decoder, recipe, name),
            "another data.decoder, or see whether the shards are sound (launch/pack.py --check)",
        )


def _check_source(recipe: Recipe, name: str) -> Finding:
    """Read from the middle of a source's largest shard."""
    opened = _open(recipe, name)
    largest = max(opened.index.shards, key=lambda shard: shard.bytes)
    size = min(READ_BYTES, largest.bytes)
    begin = (largest.bytes - size) // 2
    started = time.perf_counter()
    storage.read_bytes(storage.join(opened.index.url, largest.name), begin, begin + size, recipe.data.deadline_s)
    seconds = time.perf_counter() - started
    return Finding(f"source {name}", "ok", f"{opened.index.samples:,} videos, {size / 1e6 / seconds:.0f} MB/s")


def _check_decoder(recipe: Recipe, name: str) -> Finding:
    """Decode the first video of a source."""
    opened = _open(recipe, name)
    raw = SampleReader([opened.index], None, recipe.data.deadline_s, 1).read(0, 0, 0)
    with open_video(parse_sample(raw).video(), recipe.data.decoder) as reader:
        frames = reader.frames([0, reader.num_frames - 1])
    value = f"{recipe.data.decoder}: {raw.key}, {frames.shape[2]} x {frames.shape[1]}"
    return Finding(f"decoder, {name}", "ok", value)


def _open(recipe: Recipe, name: str) -> OpenSource:
    data = replace(recipe.data, sources={name: recipe.data.sources[name]})
    (opened,) = open_sources(replace(recipe, data=data))
    return opened
