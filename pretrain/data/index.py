"""The index beside the shards.

A data set is a folder (any fsspec URL) of plain tar shards, readable by upstream webdataset without us, and

- `index.json`: one entry a shard (name, samples, bytes, sha256 of it and of its member table) and a fingerprint of the
  whole; small, read at start;
- `<shard>.members.json` beside each shard: key, offset, size and CRC-32 of every sample in it, read when the shard is.

Member tables are apart because a data set of 100 million samples must start in seconds (docs/decisions.md).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.retries import undamaged
from pretrain.runtime.untrusted import inner_name, name_bytes, name_text, parse_json

INDEX_NAME = "index.json"
INDEX_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file: name relative to the data set's folder, number of samples, size in bytes, sha256 of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str
    members: str = ""
    """sha256 of its member table; indexes of early releases have none"""


class ShardTable(Sequence[Shard]):
    """Shards as rows of one array, which data workers share with their rank.

    As objects, the shards of 100 million samples took 50 MB more, in every process (bench/loader_scale.py).

    Args:
        shards: What becomes the rows.

    Raises:
        AttributeError, TypeError, ValueError: a name is no text, or a number no number.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        shards = list(shards)
        columns = {
            "name": _packed(one.name for one in shards),
            "samples": np.array([one.samples for one in shards], dtype=np.int64),
            "bytes": np.array([one.bytes for one in shards], dtype=np.int64),
            "sha256": _packed(one.sha256 for one in shards),
            "members": _packed(one.members for one in shards),
        }
        self._rows = np.empty(len(shards), dtype=[(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            self._rows[name] = column
        self._memory: Any = None

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        name, samples, size, sha256, members = self._rows[index].item()
        return Shard(name_text(name), samples, size, name_text(sha256), name_text(members))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and list(self) == list(other)

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """Samples of each shard."""
        return self._rows["samples"].copy()

    def __getstate__(self) -> tuple[Any, np.dtype[Any]]:
        """Return a handle for workers: torch's pickler sends tensors as shared memory, which ends with its users."""
        import torch  # seconds that those who only look at an index can do without

        if self._memory is None:
            self._memory = torch.from_numpy(self._rows.view(np.uint8).copy()).share_memory_()
            # The rank reads from the shared copy as well, or it would hold the rows twice.
            self._rows = self._memory.numpy().view(self._rows.dtype)
        return self._memory, self._rows.dtype

    def __setstate__(self, state: tuple[Any, np.dtype[Any]]) -> None:
        self._memory, columns = state
        self._rows = self._memory.numpy().view(columns)


class Keys(Sequence[str]):
    """Keys as one array of UTF-8: a worker keeps hundreds of tables, and a string object takes 50 bytes for itself."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = _packed(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [name_text(key) for key in self._keys[index].tolist()]
        return name_text(self._keys[index].item())


def _packed(texts: Iterable[str]) -> npt.NDArray[np.bytes_]:
    return np.array([name_bytes(text) for text in texts], dtype=np.bytes_)


@dataclass(frozen=True)
class MemberTable:
    """Places of the samples of one shard: members of one sample are adjacent, `sizes` includes headers and padding."""

    keys: Sequence[str]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32] | None = None
    """CRC-32 of each sample's bytes; tables of early releases have none"""
    linked: bool = False
    """samples hold links to videos in their place"""


@dataclass(frozen=True)
class ShardIndex:
    """A data set: its folder's URL and its shards, in the order of the index."""

    url: str
    shards: ShardTable

    @property
    def samples(self) -> int:
        """Samples of the whole data set."""
        return int(self.shards.samples.sum())

    @property
    def fingerprint(self) -> str:
        """Hash of names, counts and content hashes: equal fingerprints mean equal data in equal order."""
        return self._hash_of(list(self.shards)) if self.is_hashed else self.fingerprint_of_shards

    @property
    def fingerprint_of_shards(self) -> str:
        """Fingerprint as it was before the index had hashes of the member tables; runs that began then hold it."""
        return self._hash_of([replace(shard, members="") for shard in self.shards])

    @property
    def is_hashed(self) -> bool:
        """Tell whether the index holds the hash of every member table."""
        return all(shard.members for shard in self.shards)

    @staticmethod
    def _hash_of(shards: Sequence[Shard]) -> str:
        # Checkpoints hold this hash: the same entries spelt otherwise would make a run refuse its own data.
        text = json.dumps([_entry_of(shard) for shard in shards], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _entry_of(shard: Shard) -> dict[str, Any]:
    """Give a shard's entry in index.json; without a hash it is that of early releases."""
    entry = asdict(shard)
    if not shard.members:
        del entry["members"]
    return entry


def members_name(shard: str) -> str:
    """Name the member table that belongs to a shard."""
    return shard.removesuffix(".tar") + ".members.json"


def store_error(url: str, error: StorageError) -> DataError:
    """Build the error that ends the run where a file of a data set can't be read: it says nothing about any sample.

    Args:
        url: The file.
        error: What the storage said.
    """
    cause = error.__cause__
    if isinstance(cause, FileNotFoundError):
        advice = (
            "it is listed in the index but is not there: copy it again, or look for what else is missing with "
            f"launch/pack.py --check {storage.parent(url)} --hashes-only"
        )
    elif isinstance(cause, PermissionError):
        advice = "access is denied: check the credentials (they may have expired) and what they are allowed to read"
    elif cause is None:
        advice = f"see launch/pack.py --check {storage.parent(url)} --hashes-only"
    else:
        advice = (
            "check the store and the way to it, then start the same command again; data.deadline_s sets how long a "
            "run waits for an answer"
        )
    return DataError(f"{url}: can't be read: {advice}. The storage said: {error}")


def load_index(url: str, deadline_s: float = 300.0) -> ShardIndex:
    """Read `index.json` from the folder `url`, retrying for at most `deadline_s` seconds.

    Raises:
        DataError: no index there, or one that this version can't read.
    """
    where = storage.join(url, INDEX_NAME)
    try:
        content = parse_json(storage.read_bytes(where, deadline_s=deadline_s))
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise store_error(where, error) from error
        raise DataError(
            f"{where}: no readable index ({error}). Pack videos with launch/pack.py, or index shards that are "
            f"already there with: python launch/pack.py --index-only {url}"
        ) from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); write it again with launch/pack.py --index-only") from error
    return _parse_index(url, where, content)


def _parse_index(url: str, where: str, content: Any) -> ShardIndex:
    if not isinstance(content, dict) or content.get("version") != INDEX_VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{where}: index version {found!r}, this release reads {INDEX_VERSION}; index again")
    try:
        index = ShardIndex(url, ShardTable(_checked(entry) for entry in content["shards"]))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: damaged entry ({error}); write it again with launch/pack.py --index-only") from error
    if content.get("fingerprint") != index.fingerprint:
        raise DataError(
            f"{where}: fingerprint {content.get('fingerprint')} does not match its entries ({index.fingerprint}): "
            "the file was edited or cut; write it again with launch/pack.py --index-only"
        )
    return index


def _checked(entry: dict[str, Any]) -> Shard:
    """Make an entry of index.json a shard.

    Raises:
        TypeError, ValueError: a value is of another type than the packer writes, or less than 0.
    """
    shard = Shard(**entry)
    for name, value in vars(shard).items():
        expected = int if name in ("samples", "bytes") else str
        # By the very type: NumPy makes a number of "8", of 8.7 and of true, and the fingerprint would fit.
        if type(value) is not expected:
            told = "a whole number" if expected is int else "a text"
            raise TypeError(f"{name}: found {value!r}, allowed: {told}")
    if min(shard.samples, shard.bytes) < 0:
        raise ValueError(f"samples, bytes: found {shard.samples}, {shard.bytes}, allowed: 0 or more")
    inner_name(shard.name)
    return shard


def write_index(index: ShardIndex) -> None:
    """Write `index.json` into the data set's folder; comes last, after all shards and member tables."""
    content = {
        "version": INDEX_VERSION,
        "fingerprint": index.fingerprint,
        "samples": index.samples,
        "shards": [_entry_of(shard) for shard in index.shards],
    }
    storage.write_bytes(storage.join(index.url, INDEX_NAME), json.dumps(content, indent=1).encode())


def load_members(url: str, shard: Shard, deadline_s: float = 300.0) -> MemberTable:
    """Read the member table of one shard.

    Raises:
        StorageError: the storage does not hand it out.
        DataError: it is no member table, or not the one that was indexed.
    """
    where = storage.join(url, members_name(shard.name))
    data = _read_table(where, shard, url, deadline_s)
    try:
        content = parse_json(data)
        return MemberTable(
            Keys(content["keys"]),
            np.array(content["offsets"], dtype=np.int64),
            np.array(content["sizes"], dtype=np.int64),
            np.array(content["crc32"], dtype=np.uint32) if "crc32" in content else None,
            content.get("linked", False),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{where}: no readable member table ({error}); run launch/pack.py --index-only {url}"
        ) from error


def _read_table(where: str, shard: Shard, url: str, deadline_s: float) -> bytes:
    """Read the file of a member table."""

    def read() -> bytes:
        # Credentials that are wrong have been found at the index; a denial here may be one that passes.
        return storage.read_bytes(where, deadline_s=deadline_s, denied_for_good=False)

    data = undamaged(read, lambda data: shard.members in ("", hashlib.sha256(data).hexdigest()))
    found = hashlib.sha256(data).hexdigest()
    if shard.members not in ("", found):
        raise DataError(
            f"{where}: this member table is not the one that was indexed (sha256 {found[:12]}..., {INDEX_NAME} says "
            f"{shard.members[:12]}...): it was damaged, changed or replaced. Copy it again, or write the tables anew "
            f"from the shards with launch/pack.py --index-only {url}"
        )
    return data


def table_bytes(members: MemberTable) -> bytes:
    """Give the file of a member table, whose hash its shard's entry holds."""
    content: dict[str, Any] = {
        "keys": list(members.keys), "offsets": members.offsets.tolist(), "sizes": members.sizes.tolist()
    }  # fmt: skip
    if members.checksums is not None:
        content["crc32"] = members.checksums.tolist()
    if members.linked:
        content["linked"] = True
    return json.dumps(content).encode()


def write_members(url: str, shard: str, members: MemberTable) -> None:
    """Write the member table of one shard."""
    storage.write_bytes(storage.join(url, members_name(shard)), table_bytes(members))


def describe_unhashed(url: str) -> str:
    """Say that an index holds no hashes of its member tables, and what adds them."""
    return (
        f"{url}: its index is older than the hashes of member tables, so a table that is damaged or changed is not "
        f"noticed; launch/pack.py --index-only {url} adds them (it reads the shards; runs that have begun go on)"
    )
