"""Writing shards, the journal beside them, and putting parts together.

Everything that a restart or another machine needs lies in the data set's folder, below `_pack/`:

- `_pack/<shard>.json`, written after the shard itself: a shard without it does not count and is written again;
- `_pack/part-<i>of<n>.json`, written when a part is done: its shards and its rejected videos.
"""

import json
import logging
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.data.index import INDEX_NAME, Shard, ShardIndex, ShardTable, members_name, write_index, write_members
from pretrain.data.media import kind_of, plural_of
from pretrain.data.motion_tables import MOTION_NAME, table_name
from pretrain.data.pack.pack_plan import Part
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.data.pack.scan import scan_shard
from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

FOLDER = "_pack"
REJECTED_NAME = "rejected.jsonl"


@dataclass
class Entry:
    """One finished shard in the journal.

    Attributes:
        plan: fingerprint of the plan that it belongs to.
        next: number of the part's first item that comes after this shard.
        shard: None in an entry that only closes a part whose last items were all rejected.
        originals: (sha256 of the original, its name) of every sample, to find duplicates after a restart.
        rejected: videos left out between the previous shard and the end of this one.
    """

    plan: str
    next: int
    shard: Shard | None
    originals: list[tuple[str, str]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    def to_json(self) -> bytes:
        """Write the entry as it is stored."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> "Entry":
        """Read a stored entry."""
        content = parse_json(data)
        return Entry(
            content["plan"],
            content["next"],
            None if content["shard"] is None else Shard(**content["shard"]),
            [(sha256, name) for sha256, name in content["originals"]],
            [Rejected(**one) for one in content["rejected"]],
        )


class ShardFile:
    """A shard under construction: a local tar file, handed over to the data set's folder when it is full."""

    def __init__(self, folder: str, name: str) -> None:
        from webdataset import TarWriter  # imports torch: seconds that --help and workers can do without

        self.name, self.folder = name, folder
        self.path = os.path.join(folder, name)
        self.samples = 0
        self._file = open(self.path, "wb")
        # No times and no user of this machine: packed bytes depend on the videos and options alone.
        self._tar = TarWriter(self._file, user="tubelet", group="tubelet", mtime=0, format="PAX_FORMAT")

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return int(self._tar.tarstream.offset)

    def add(self, packed: Packed) -> None:
        """Append one sample: `<key>.json` and its other members, next to each other; its local files are deleted."""
        members = {ending: Path(path).read_bytes() for ending, path in packed.files.items()}
        facts = json.dumps(packed.facts, sort_keys=True).encode()
        self._tar.write({"__key__": packed.facts["key"], "json": facts, **members})
        packed.discard()
        self.samples += 1

    def publish(self, url: str) -> Shard:
        """Close the file, copy it and its member table to the folder `url`."""
        self._tar.close()
        self._file.close()
        # Read back by the code that indexes shards of others: an entry must not depend on who wrote its shard.
        shard, members, oddities = scan_shard(self.folder, self.name)
        for line in oddities:
            logger.warning(line)
        storage.upload(self.path, storage.join(url, self.name))
        write_members(url, self.name, members)
        os.unlink(self.path)
        return shard


def shard_name(part: Part, number: int) -> str:
    """Name a part's shard."""
    return f"{part.prefix}-{number:06d}.tar"


def read_journal(url: str, part: Part, plan: str) -> list[Entry]:
    """Read the entries of the shards of `part` that are finished, in order.

    Raises:
        DataError: they belong to another plan.
    """
    entries: list[Entry] = []
    while (entry := _read_entry(storage.join(url, FOLDER, f"{shard_name(part, len(entries))}.json"))) is not None:
        _check_plan(url, entry, plan)
        entries.append(entry)
    return entries


def write_entry(url: str, entry: Entry) -> None:
    """Enter a finished shard into the journal; comes after the shard and its member table."""
    assert entry.shard is not None
    storage.write_bytes(storage.join(url, FOLDER, f"{entry.shard.name}.json"), entry.to_json())


def _read_entry(where: str) -> Entry | None:
    if not storage.exists(where):
        return None
    try:
        return Entry.from_json(storage.read_bytes(where))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: damaged ({error}); delete it, and its shard is packed again") from error


def _check_plan(url: str, entry: Entry, plan: str) -> None:
    if entry.plan != plan:
        raise DataError(
            f"{url}: holds shards packed from other videos or with other options (plan {entry.plan}, now {plan}); "
            "repeat the first command, choose another DEST, or start afresh with --overwrite"
        )


def _part_url(url: str, part: Part) -> str:
    return storage.join(url, FOLDER, f"part-{part.index:04d}of{part.count:04d}.json")


@dataclass(frozen=True)
class PartResult:
    """Result of a finished part: what it wrote and left out."""

    plan: str
    shards: list[Shard]
    rejected: list[Rejected]


def write_part(url: str, part: Part, result: PartResult) -> None:
    """Mark a part as done."""
    storage.write_bytes(_part_url(url, part), json.dumps(asdict(result), indent=1).encode())


def read_part(url: str, part: Part) -> PartResult | None:
    """Read what a part wrote; None while it isn't done."""
    where = _part_url(url, part)
    if not storage.exists(where):
        return None
    try:
        content: dict[str, Any] = parse_json(storage.read_bytes(where))
        shards = [Shard(**one) for one in content["shards"]]
        return PartResult(content["plan"], shards, [Rejected(**one) for one in content["rejected"]])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: damaged ({error}); delete it and run that part again: it finds its shards"
        ) from error


def merge(url: str, count: int, require: bool = False) -> tuple[ShardIndex, list[Rejected]] | None:
    """Write `index.json` and `rejected.jsonl` when all `count` parts are done.

    Args:
        require: raise instead of returning None while parts are missing.

    Raises:
        DataError: parts are missing, or were packed from different plans, or hold no video at all.
    """
    found = [read_part(url, Part(index, count)) for index in range(count)]
    results = [result for result in found if result is not None]
    if len(results) < count:
        missing = ", ".join(f"{index}/{count}" for index, result in enumerate(found) if result is None)
        if require:
            raise DataError(f"{url}: these parts are not done yet: {missing}; run them, then merge again")
        return None
    if len({result.plan for result in results}) > 1:
        raise DataError(f"{url}: the parts come from different videos or options; pack all with one command line")
    # By name: parts end in any order, and equal data must have equal fingerprints.
    shards = sorted((shard for result in results for shard in result.shards), key=lambda shard: shard.name)
    rejected = [one for result in results for one in result.rejected]
    # Before the error below, which sends its reader to this file.
    storage.write_bytes(
        storage.join(url, REJECTED_NAME), b"".join(json.dumps(asdict(one)).encode() + b"\n" for one in rejected)
    )
    if not shards:
        raise DataError(_nothing_packed(url, rejected))
    index = ShardIndex(url, ShardTable(shards))
    write_index(index)
    return index, rejected


def _nothing_packed(url: str, rejected: list[Rejected]) -> str:
    reasons = Counter(one.reason for one in rejected)
    hint = "; do relative paths in the list start elsewhere? Say where with --data-root" if "missing" in reasons else ""
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    # Folders of frames have no ending.
    noun = plural_of(kind_of(one.path) or "video" for one in rejected)[:-1]
    # One of the most frequent reason: what all have in common is what the user must change.
    shown = next(one for one in rejected if one.reason == reasons.most_common(1)[0][0])
    said = f"{shown.path}: {shown.detail}"
    return f"{url}: not one {noun} could be packed ({counted}): {said}; {REJECTED_NAME} there says why for each{hint}"


def refuse_foreign(url: str) -> None:
    """Raise DataError when the folder `url` holds a data set that was not written here: its index would be lost."""
    if storage.exists(storage.join(url, INDEX_NAME)) and not storage.exists(storage.join(url, FOLDER)):
        raise DataError(f"{url}: holds an index of shards that pack.py did not write; choose another DEST")


def remove_old(url: str) -> None:
    """Delete what an earlier packing left in the folder `url`, and nothing else; the index goes first."""
    storage.remove(storage.join(url, INDEX_NAME))
    try:
        names = list(storage.find(url))
    except StorageError:
        return
    for name in names:
        own = name.startswith("shard") and name.endswith((".tar", members_name(""), table_name("")))
        if own or name.startswith(FOLDER + "/") or name in (REJECTED_NAME, MOTION_NAME):
            storage.remove(storage.join(url, name))


def count_parts(url: str) -> int:
    """Count the parts into which the data set at `url` was divided.

    Raises:
        DataError: no part is done there, or parts of different divisions are.
    """
    names = storage.find(storage.join(url, FOLDER))
    counts = {int(name[-9:-5]) for name in names if re.fullmatch(r"part-\d{4}of\d{4}\.json", name)}
    if len(counts) != 1:
        found = f"parts of {sorted(counts)}" if counts else "no finished part"
        raise DataError(f"{url}: {found}; --merge needs the finished parts of one division, from --part I/N")
    return counts.pop()
