"""Cores of this host: those that a process may use, those near its device, and what falls to each rank.

Ranks of a host may share cores, each have its own (Slurm's --cpus-per-task), or overlap in part, so they tell each
other which ones they may use.
"""

import logging
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)

Affinity = Literal["device", "none"]

#: Where Linux describes devices and NUMA nodes, and a control group (version 2) its processor time.
SYSFS, CGROUP = Path("/sys"), Path("/sys/fs/cgroup")

#: Share of its cores that a rank may lose by being bound; where devices hang on one socket, it would be half of them.
LOSS = 0.1


#: End of a reason for not binding.
AS_IT_IS = "; left as it is"


@dataclass(frozen=True)
class RankCores:
    """What a rank tells the others.

    Attributes:
        host: name of its host.
        allowed: cores that it may use.
        near: those of the NUMA node of its device; empty: unknown, or all are equally near.
    """

    host: str
    allowed: frozenset[int]
    near: frozenset[int] = frozenset()

    @property
    def bound(self) -> frozenset[int]:
        """Cores that it is left with near its device; all that it may use where none of them is."""
        return self.allowed & self.near or self.allowed


@dataclass(frozen=True)
class CoreShare:
    """A rank's part of its host.

    Attributes:
        cores: of the host, that its ranks may use.
        ranks: of the run on this host.
        own: cores for this rank, 1 or more.
    """

    cores: int
    ranks: int
    own: int


def usable_cores(cgroup: Path = CGROUP) -> int:
    """Count the cores that this process may use: its affinity, and the limit of its container."""
    return max(1, math.floor(min(len(os.sched_getaffinity(0)), processor_quota(cgroup))))


def processor_quota(cgroup: Path = CGROUP) -> float:
    """Read how many cores' time this container gets (`docker run --cpus`, Kubernetes' limits); inf: no limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no control group of version 2, or the root of all, which has no such file
        return math.inf
    return math.inf if limit == "max" else int(limit) / int(period)


def share_cores(ranks: Ranks, cgroup: Path = CGROUP) -> CoreShare:
    """Agree on the cores that fall to this rank; all ranks call it, after they have been bound."""
    own = RankCores(platform.node(), frozenset(os.sched_getaffinity(0)))
    return divide(gather_objects(ranks, own), ranks.rank, processor_quota(cgroup))


def divide(found: Sequence[RankCores], rank: int, quota: float = math.inf) -> CoreShare:
    """Divide the cores of a rank's host among those that may use each; `quota` is of the host's ranks together."""
    here = [one for one in found if one.host == found[rank].host]
    together = len(frozenset().union(*(one.allowed for one in here)))
    own = _share(found[rank].allowed, [one.allowed for one in here])
    return CoreShare(
        max(1, math.floor(min(together, quota))), len(here), max(1, math.floor(min(own, quota / len(here))))
    )


def _share(own: frozenset[int], each: Sequence[frozenset[int]]) -> float:
    sharers = Counter(core for one in each for core in one)
    return sum(1 / sharers[core] for core in own)


def bind_to_device(ranks: Ranks, affinity: Affinity, sysfs: Path = SYSFS) -> None:
    """Keep this rank, and what it starts from now on, on the cores of the NUMA node of its device.

    Pinned memory then lies beside the device, and a copy does not cross the sockets. Narrower bounds that Slurm or a
    launcher has set stay. All ranks call it; rank 0 tells what came of it where a host has several NUMA nodes.
    """
    if affinity == "none" or ranks.device.type != "cuda":
        return
    own = RankCores(platform.node(), frozenset(os.sched_getaffinity(0)), near_cores(ranks.device, sysfs))
    found = gather_objects(ranks, own)
    reason = why_unbound(found, ranks.rank)
    if not reason and own.bound != own.allowed:
        bind_threads(own.bound)
    if ranks.first and any(one.near for one in found):
        logger.info("data.affinity: %s", reason or f"{len(own.bound)} of {len(own.allowed)} cores, near {ranks.device}")


def why_unbound(found: Sequence[RankCores], rank: int) -> str:
    """Say why a rank's host is left alone; empty: it is not."""
    host = found[rank].host
    here = [one for one in found if one.host == host]
    if not all(one.near for one in here):
        return f"{host} does not say which cores are near each device{AS_IT_IS}"
    if not all(one.allowed & one.near for one in here):
        return f"{host}: a rank was bound to cores far from its device (by Slurm, or numactl){AS_IT_IS}"
    before, after = [one.allowed for one in here], [one.bound for one in here]
    kept = min(_share(one.bound, after) / _share(one.allowed, before) for one in here)
    # The cores of a node without devices would decode nothing, and decoding needs more of them than it gains.
    return "" if kept >= 1 - LOSS else f"{host}: the ranks' devices are not spread over its NUMA nodes{AS_IT_IS}"


def bind_threads(cores: frozenset[int]) -> None:
    """Bind all threads that this process has; those it starts later, and its children, inherit."""
    for thread in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:  # it ended in the meantime
            continue


def near_cores(device: torch.device, sysfs: Path = SYSFS) -> frozenset[int]:
    """Find the cores of the NUMA node of a GPU; none where the host has one such node, or does not tell."""
    if len(list((sysfs / "devices/system/node").glob("node[0-9]*"))) < 2:
        return frozenset()
    found = torch.cuda.get_device_properties(device)
    # Missing from torch's own stubs.
    place = [getattr(found, f"pci_{part}_id") for part in ("domain", "bus", "device")]
    folder = sysfs / "bus/pci/devices" / "{:04x}:{:02x}:{:02x}.0".format(*place)
    try:
        return parse_cores((folder / "local_cpulist").read_text(encoding="ascii"))
    except OSError:  # a virtual machine that hides the bus
        return frozenset()


def parse_cores(text: str) -> frozenset[int]:
    """Read Linux's list of cores, such as `0-3,8,10-11`."""
    pieces = (piece.partition("-") for piece in text.strip().split(",") if piece)
    return frozenset(core for low, _, high in pieces for core in range(int(low), int(high or low) + 1))
