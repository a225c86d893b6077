"""The plan: the key of each video, their order, and the part that packs each. Pure, so that every run agrees."""

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pretrain.data.pack.discover import Item
from pretrain.runtime.untrusted import name_bytes

_UNSAFE = re.compile(r"[^A-Za-z0-9_/-]+")
_LONGEST_KEY = 180
#: Fields of items that a first release did not have, with what says nothing.
_NOTHING: tuple[tuple[str, object], ...] = (
    ("segment", None), ("kind", "video"), ("companions", ()), ("distinct", False),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` equal workers of a job array."""

    index: int = 0
    count: int = 1

    @property
    def prefix(self) -> str:
        """Start of the names of the shards that this part writes."""
        return "shard" if self.count == 1 else f"shard-{self.index:04d}of{self.count:04d}"


#: All of the plan: no job array.
WHOLE = Part()


@dataclass(frozen=True)
class Plan:
    """Items with unique keys in packing order, and those that the same list named twice."""

    items: tuple[Item, ...]
    repeated: tuple[Item, ...]

    def part(self, part: Part) -> list[Item]:
        """Select the items of one part. Videos go by their size in bytes, so equal files always meet in the same part;
        segments by their bounds as well, or a film would be the work of one part."""
        if part.count == 1:
            return list(self.items)
        return [item for item in self.items if _hash(f"{item.size}{_bounds(item)}") % part.count == part.index]

    def fingerprint(self, options: object) -> str:
        """Hash of what is packed and how; shards of another fingerprint can't be continued."""
        digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
        for item in self.items:
            # Without fields where nothing is in them: packings that an earlier release began can go on.
            facts = {name: value for name, value in asdict(item).items() if (name, value) not in _NOTHING}
            digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]


def make_plan(items: Sequence[Item], shuffle: bool = True) -> Plan:
    """Assign keys and the order.

    Args:
        items: what `gather` found.
        shuffle: order by a hash of the key, so that every shard holds a mix of classes; else the order given.
    """
    once, repeated = _without_repeats(items)
    keyed = _with_keys(once)
    if shuffle:
        keyed.sort(key=lambda item: (_hash(item.key), item.key))
    return Plan(tuple(keyed), tuple(repeated))


def _without_repeats(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    seen: set[str] = set()
    once: list[Item] = []
    repeated: list[Item] = []
    for item in items:
        identity = _identity(item)
        (repeated if identity in seen else once).append(item)
        seen.add(identity)
    return once, repeated


def _identity(item: Item) -> str:
    return f"{item.path}\x1f{item.frames}{_bounds(item)}" + (f"\x1f{item.key}" if item.distinct else "")


def _bounds(item: Item) -> str:
    return "" if item.segment is None else f"\x1f{item.segment.start!r}\x1f{item.segment.end!r}"


def _with_keys(items: list[Item]) -> list[Item]:
    """Make keys from names; where two names give one key, all get a hash of their path, whatever their order."""
    keys = [key_from(item.key or _stem(item)) for item in items]
    shared = {key for key, count in Counter(keys).items() if count > 1}
    return [
        replace(item, key=f"{key}-{_hash(_identity(item)):016x}" if key in shared else key)
        for item, key in zip(items, keys, strict=True)
    ]


def _stem(item: Item) -> str:
    """Return the name without its ending; with the bounds in milliseconds for a segment, so that keys sort by time."""
    if item.is_folder:
        return item.name
    stem = posixpath.splitext(item.name)[0]
    if item.segment is None:
        return stem
    start, end = item.segment
    return f"{stem}_{round(1000 * start):08d}-{'end' if end is None else f'{round(1000 * end):08d}'}"


def key_from(name: str) -> str:
    """Make a sample key from a path: no dots (webdataset cuts at the first), letters, digits, `_`, `-` and `/` only."""
    parts = [_UNSAFE.sub("_", part) for part in name.split("://")[-1].split("/") if part not in ("", ".", "..")]
    key = "/".join(parts) or "_"
    return key if len(key) <= _LONGEST_KEY else f"{key[: _LONGEST_KEY - 17]}-{_hash(key):016x}"


def _hash(text: str) -> int:
    # Python's own hash is another in every process; parts, restarts and machines must agree.
    return int.from_bytes(hashlib.blake2b(name_bytes(text), digest_size=8).digest(), "big")
