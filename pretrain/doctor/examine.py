"""All checks of all hosts of a run, by launch/doctor.py; the cheap ones are those of every start (start_checks.py).

Every rank examines its own host; what they found is gathered and told once, with the hosts that differ named.
"""

import functools
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from pretrain.data.fetch import SampleReader
from pretrain.data.members import parse_sample
from pretrain.data.samples import Place, SourceInfo
from pretrain.data.stream_plan import OpenSource, open_sources
from pretrain.doctor.links import check_links
from pretrain.doctor.network import judge_network
from pretrain.doctor.nvml import check_gpu
from pretrain.engine.demand import demand_of
from pretrain.engine.start_checks import check_clock, check_limits, check_same_everywhere, compare
from pretrain.objectives.base import Method
from pretrain.recipe.schema import Recipe
from pretrain.runtime import host_checks, storage
from pretrain.runtime.dtypes import DTYPES
from pretrain.runtime.environment import commit
from pretrain.runtime.findings import Finding, Line, Status, attempt, merge
from pretrain.runtime.process_group import Ranks, gather_objects

#: A host that computes at less than this share of what the usual one does slows all of them down.
SLOW = 0.7

#: Bytes read from each source to measure it.
READ_BYTES = 32 << 20


def examine(method: Method, ranks: Ranks, nccl: Path | None = None) -> list[Line]:
    """Make all checks of all hosts; the same lines on every rank.

    Args:
        method: the run.
        ranks: this process among all.
        nccl: file that NCCL writes its choices into (doctor/network.py).
    """
    recipe = method.recipe
    hosts = gather_objects(ranks, platform.node())
    findings = [
        *check_limits(method, ranks, demand_of(method, ranks)),
        *check_same_everywhere(recipe, ranks),
        compare(gather_objects(ranks, commit() or "no git checkout"), ranks.rank, "commit", essential=True),
        check_clock(ranks),
        *_device(recipe, ranks),
        *check_gpu(ranks.device),
        *check_links(ranks, hosts),
    ]
    if ranks.device.type == "cuda":  # only now: NCCL chooses when ranks first talk
        said = nccl.read_text(errors="replace") if nccl is not None and nccl.exists() else ""
        findings.append(judge_network(said, len(set(hosts)) > 1, os.environ))
    if hosts.index(hosts[ranks.rank]) == ranks.rank:  # one rank of each host is enough for what its ranks share
        findings += _storage(method, ranks)
    dist.barrier()
    return merge(gather_objects(ranks, findings), hosts)


def _device(recipe: Recipe, ranks: Ranks) -> Iterator[Finding]:
    device = ranks.device
    yield attempt("arithmetic", lambda: host_checks.check_arithmetic(device), "look at the driver's log (dmesg)")
    yield attempt("memory", lambda: host_checks.check_memory(device), "see what else uses this device's memory")
    rates = gather_objects(ranks, host_checks.measure_matmul(device, DTYPES[recipe.compute.dtype]))
    usual, own = sorted(rates)[len(rates) // 2], rates[ranks.rank]
    status: Status = "ok" if own >= SLOW * usual else "warn"
    value = f"{own:.2f} TFLOP/s, the usual rank {usual:.2f}"
    yield Finding("matrix products", status, value, "" if status == "ok" else "look for heat, power caps, other jobs")


def _storage(method: Method, ranks: Ranks) -> Iterator[Finding]:
    recipe, root = method.recipe, method.recipe.run.dir
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
            functools.partial(_check_sample, method, name),
            "another input.decoder, or see whether the shards are sound (launch/pack.py --check)",
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


def _check_sample(method: Method, name: str) -> Finding:
    """Make the first sample of a source as data workers do."""
    recipe = method.recipe
    opened = _open(recipe, name)
    samples, source = method.samples(), SourceInfo(name, opened.index.shards, opened.options)
    number = list(recipe.data.sources).index(name)
    motion = {0} if number in samples.motion_sources else ()
    raw = SampleReader([opened.index], None, recipe.data.deadline_s, 1, motion).read(0, 0, 0)
    arrays = samples(Place(0, 0, number, 0, 0), source, parse_sample(raw))
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in arrays.items())
    return Finding(f"decoder, {name}", "ok", f"{raw.key}: {shapes}")


def _open(recipe: Recipe, name: str) -> OpenSource:
    data = replace(recipe.data, sources={name: recipe.data.sources[name]})
    (opened,) = open_sources(data)
    return opened
