"""A folder of tags: the list, what each sample of some shards has of it, and embeddings of the tags.

- `tags.txt`, a tag a line, its number is its line; `tags.json`, what it was made of and its statistics;
- `parsed/<shard's sha256>.jsonl`, what captions say, before a list is chosen;
- `tables/<shard's sha256>.npz`, numbers of the tags of each sample of a shard, in the order of the shard's index;
- `embeddings.safetensors`, float32 [K, E], a row a tag.

Tables and embeddings hold a hash of the list, in its order: beside another list they would say something else without
any error. Shards are known by their content, so a table never belongs to another one.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.index import Shard
from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

LIST, FACTS, EMBEDDINGS = "tags.txt", "tags.json", "embeddings.safetensors"
#: Key of the list's hash in tables and in the metadata of embeddings.
HASH = "tags_sha256"
BUILD = "python launch/tag.py SHARDS --out FOLDER makes it"

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TagTable:
    """Tags of a shard's samples.

    Attributes:
        offsets: int64 [n + 1]; row i has numbers[offsets[i]:offsets[i + 1]].
        numbers: of tags, int32.
        reasons: why a row has none; "" where it has some.
    """

    offsets: npt.NDArray[np.int64]
    numbers: Numbers
    reasons: list[str]

    def row(self, index: int) -> Numbers:
        """Return the tags of a sample, each once, ascending."""
        return self.numbers[self.offsets[index] : self.offsets[index + 1]]


def list_hash(tags: Sequence[str]) -> str:
    """Hash a list of tags in its order."""
    return hashlib.sha256("\n".join(tags).encode()).hexdigest()


def read_tags(folder: str) -> list[str]:
    """Read the list.

    Raises:
        DataError: there is none, it is no text, or a tag is in it twice.
    """
    content = _read(storage.join(folder, LIST))
    try:
        tags = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{storage.join(folder, LIST)}: not in UTF-8 ({error})") from error
    return checked_tags(tags, storage.join(folder, LIST))


def checked_tags(lines: Sequence[str], where: str) -> list[str]:
    """Strip the lines of a list of tags, which must be there once each.

    Raises:
        DataError: no tag, an empty line between others, or one twice.
    """
    tags = [line.strip() for line in lines]
    while tags and not tags[-1]:
        tags.pop()
    if not tags:
        raise DataError(f"{where}: no tag in it; a tag a line is needed")
    seen: set[str] = set()
    for number, tag in enumerate(tags, 1):
        if not tag or tag in seen:
            # Left out, it would move all that follow to other numbers.
            raise DataError(f"{where}:{number}: {'an empty line' if not tag else f'{tag!r} again'}; each tag once")
        seen.add(tag)
    return tags


def table_path(folder: str, shard: Shard) -> str:
    """Name the table of a shard.

    Raises:
        DataError: the index does not say what is in the shard.
    """
    if not shard.sha256:
        raise DataError(f"{shard.name}: its index has no sha256, by which tags are found; index the shards again")
    return storage.join(folder, "tables", f"{shard.sha256}.npz")


def write_table(folder: str, shard: Shard, table: TagTable, tags_sha256: str) -> None:
    """Write the table of a shard."""
    target = io.BytesIO()
    reasons = np.array(table.reasons, dtype=np.str_)
    np.savez_compressed(
        target, offsets=table.offsets, numbers=table.numbers, reasons=reasons, tags_sha256=np.array(tags_sha256)
    )
    storage.write_bytes(table_path(folder, shard), target.getvalue())


def read_table(folder: str, shard: Shard, tags_sha256: str) -> TagTable:
    """Read the table of a shard.

    Raises:
        DataError: there is none, it is damaged, or its numbers are of another list.
    """
    where = table_path(folder, shard)
    try:
        # Never pickled: a table may come from elsewhere.
        with np.load(io.BytesIO(_read(where, f" (of shard {shard.name})")), allow_pickle=False) as found:
            stated, table = str(found[HASH]), TagTable(found["offsets"], found["numbers"], found["reasons"].tolist())
    except (ValueError, KeyError, OSError, EOFError) as error:
        raise DataError(f"{where}: damaged ({error}); remove it, and {BUILD} again") from error
    if stated != tags_sha256:
        raise DataError(
            f"{where}: numbers of the list {stated[:12]}, {storage.join(folder, LIST)} is {tags_sha256[:12]}: other "
            f"tags, or in another order; {BUILD} again"
        )
    if len(table.offsets) != shard.samples + 1 or table.offsets[-1] != len(table.numbers):
        raise DataError(f"{where}: {len(table.offsets) - 1} rows, the shard {shard.name} has {shard.samples} samples")
    return table


def read_facts(folder: str) -> dict[str, object]:
    """Read what the list was made of; empty where nothing says it."""
    where = storage.join(folder, FACTS)
    if not storage.exists(where):
        return {}
    try:
        found = parse_json(_read(where))
    except ValueError as error:
        raise DataError(f"{where}: damaged ({error})") from error
    return dict(found)


def _read(where: str, of: str = "") -> bytes:
    try:
        return storage.read_bytes(where)
    except StorageError as error:
        raise DataError(f"{where}: can't be read{of}: {error}; {BUILD}") from error
