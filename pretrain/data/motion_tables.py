"""Motion curves beside the shards: how much the frames of each video move, measured once (launch/motion_index.py).

- `<shard>.motion.npz` beside a shard: the curves of its samples, in the order of its member table, and what they were
  made of: measure, resolution, and the sha256 of the shard;
- `motion.json` beside `index.json`: the sha256 of every such table, how many videos have no curve, and why.

Shards and `index.json` stay as they are, and so does the fingerprint of the data; the curves have one of their own.
"""

import hashlib
import io
import json
import threading
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt

from pretrain.data.index import Shard, ShardIndex, store_error
from pretrain.errors import DataError, SampleError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.retries import undamaged
from pretrain.runtime.untrusted import parse_json

Curve = npt.NDArray[np.float32]

MOTION_NAME = "motion.json"
MOTION_VERSION = 1
#: Ending of a member that holds the curve of its own sample, where shards of others have one.
MOTION_ENDING = "motion.npy"


@dataclass(frozen=True)
class MotionFacts:
    """How curves were measured; curves of two ways don't mix.

    Attributes:
        kind: measure: ssim, abs or feature.
        short_side: frames were shrunk to so many pixels; None: full resolution.
        weights: sha256 of the convolution's weights, for feature; of released files "imported".
    """

    kind: str
    short_side: int | None = None
    weights: str = ""


@dataclass(frozen=True)
class MotionTable:
    """Curves of one shard: for each sample raw motion float32 [M - 1], or None and the reason why there is none."""

    facts: MotionFacts
    shard: str
    curves: list[Curve | None]
    reasons: list[str]


@dataclass(frozen=True)
class MotionEntry:
    """One shard in `motion.json`.

    Attributes:
        name: of the shard.
        shard: sha256 of the shard, as index.json has it.
        sha256: of its table of curves.
        static: videos in which nothing moves.
        missing: reason by key of each sample without a curve.
    """

    name: str
    shard: str
    sha256: str
    static: int = 0
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MotionIndex:
    """Curves of a data set."""

    facts: MotionFacts
    entries: list[MotionEntry]

    @property
    def fingerprint(self) -> str:
        """Hash of all curves: equal fingerprints choose equal frames."""
        text = json.dumps([[entry.name, entry.sha256] for entry in self.entries])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def table_name(shard: str) -> str:
    """Name the table that belongs to a shard."""
    return shard.removesuffix(".tar") + ".motion.npz"


def motion_bytes(table: MotionTable) -> bytes:
    """Give the file of a table; equal tables have equal bytes."""
    filled = [np.zeros(0, np.float32) if curve is None else curve for curve in table.curves]
    lengths = [-1 if curve is None else len(curve) for curve in table.curves]
    facts = {"version": MOTION_VERSION, "shard": table.shard, **asdict(table.facts), "reasons": table.reasons}
    file = io.BytesIO()
    np.savez(
        file,
        curves=np.concatenate([np.zeros(0, np.float32), *filled]),
        lengths=np.array(lengths, dtype=np.int64),
        facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
    )
    return file.getvalue()


def parse_motion(data: bytes, where: str) -> MotionTable:
    """Read the file of a table.

    Raises:
        DataError: it is no such table.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            facts = parse_json(file["facts"].tobytes())
            lengths, values = file["lengths"], file["curves"].astype(np.float32, copy=False)
        if facts["version"] != MOTION_VERSION:
            raise ValueError(f"version {facts['version']}, this release reads {MOTION_VERSION}")
        ends = np.cumsum(np.maximum(lengths, 0))
        if (ends[-1] if len(ends) else 0) != len(values) or len(facts["reasons"]) != len(lengths):
            raise ValueError("its columns don't fit each other")
        curves = [None if length < 0 else values[end - length : end]
                  for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)]  # fmt: skip
        known = MotionFacts(facts["kind"], facts["short_side"], facts["weights"])
        return MotionTable(known, facts["shard"], curves, facts["reasons"])
    except (ValueError, KeyError, TypeError, OSError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: no readable table of motion curves ({error}); {_AGAIN}") from error


_AGAIN = "delete it and run launch/motion_index.py on its folder again, which measures what is missing"


def parse_curve(data: bytes) -> Curve:
    """Read a member `motion.npy`.

    Raises:
        SampleError: "motion" where it holds no row of numbers.
    """
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
        if values.ndim != 1:
            raise ValueError(f"an array of shape {list(values.shape)}")
        return values.astype(np.float32)
    except (ValueError, TypeError, OSError, EOFError, AttributeError) as error:
        raise SampleError("motion", f"its {MOTION_ENDING} holds no row of numbers: {error}") from error


def write_motion_index(url: str, index: MotionIndex) -> None:
    """Write `motion.json`; comes last, after all tables."""
    content = {
        "version": MOTION_VERSION,
        "fingerprint": index.fingerprint,
        "facts": asdict(index.facts),
        "shards": [asdict(entry) for entry in index.entries],
    }
    storage.write_bytes(storage.join(url, MOTION_NAME), json.dumps(content, indent=1).encode())


def load_motion_index(index: ShardIndex, deadline_s: float = 300.0) -> MotionIndex | None:
    """Read `motion.json` of a data set; None where there is none.

    Raises:
        DataError: it can't be read, is damaged, or was made of other shards.
    """
    where = storage.join(index.url, MOTION_NAME)
    try:
        content = parse_json(storage.read_bytes(where, deadline_s=deadline_s))
        found = MotionIndex(MotionFacts(**content["facts"]), [MotionEntry(**entry) for entry in content["shards"]])
        if content["version"] != MOTION_VERSION or content["fingerprint"] != found.fingerprint:
            raise ValueError("another version, or it was edited or cut")
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise store_error(where, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: damaged ({error}); {_AGAIN}") from error
    made_of = [(entry.name, entry.shard) for entry in found.entries]
    if made_of != [(shard.name, shard.sha256) for shard in index.shards]:
        raise DataError(
            f"{where}: its curves are of other shards than {index.url} holds now: run launch/motion_index.py "
            f"{index.url} again, which measures those that have changed"
        )
    return found


class MotionTables:
    """Reader of the curves of one data set; safe to use from many threads.

    Args:
        index: the data set.
        deadline_s: longest time of one read, retries included, seconds.
        kept: tables kept in memory; one takes 4 bytes for each frame of its shard.
    """

    def __init__(self, index: ShardIndex, deadline_s: float, kept: int) -> None:
        self._index, self._deadline_s, self._kept = index, deadline_s, kept
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, MotionTable] = OrderedDict()
        self._entries: list[MotionEntry] | None = None

    def curve(self, shard: int, row: int) -> Curve | None:
        """Return the curve of a sample, float32 [M - 1]; None where it, or the whole data set, has none.

        Raises:
            DataError: tables can't be read, or are of other shards.
        """
        # Held while reading: the threads of a worker would else all read the same table at its start.
        with self._lock:
            if self._entries is None:
                found = load_motion_index(self._index, self._deadline_s)
                self._entries = [] if found is None else found.entries
            if not self._entries:
                return None
            if shard not in self._tables:
                self._tables[shard] = read_motion(self._index, self._entries[shard], self._deadline_s)
                if len(self._tables) > self._kept:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(shard)
            return self._tables[shard].curves[row]


def read_motion(index: ShardIndex, entry: MotionEntry, deadline_s: float = 300.0) -> MotionTable:
    """Read the table of one shard.

    Raises:
        DataError: it can't be read, or is not the one that was written.
    """
    where = storage.join(index.url, table_name(entry.name))

    def read() -> bytes:
        return storage.read_bytes(where, deadline_s=deadline_s, denied_for_good=False)

    try:
        data = undamaged(read, lambda data: hashlib.sha256(data).hexdigest() == entry.sha256)
    except StorageError as error:
        raise store_error(where, error) from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataError(f"{where}: not the curves that {MOTION_NAME} lists: damaged, changed or replaced; {_AGAIN}")
    return parse_motion(data, where)


def finished_table(url: str, shard: Shard, facts: MotionFacts) -> tuple[MotionTable, str] | None:
    """Read the table of a shard where it is there, whole, of this shard, and measured in this way; with its sha256.

    Raises:
        DataError: the storage does not answer.
    """
    where = storage.join(url, table_name(shard.name))
    if not storage.exists(where):
        return None
    try:
        data = storage.read_bytes(where)
        table = parse_motion(data, where)
    except StorageError as error:
        raise store_error(where, error) from error
    except DataError:  # cut by a crash while it was written
        return None
    if (table.shard, table.facts, len(table.curves)) != (shard.sha256, facts, shard.samples):
        return None
    return table, hashlib.sha256(data).hexdigest()


def describe_motion(index: MotionIndex, samples: int) -> str:
    """Say in a line how many videos have curves."""
    missing, static = sum(len(entry.missing) for entry in index.entries), sum(entry.static for entry in index.entries)
    how = index.facts.kind + (f" at {index.facts.short_side} pixels" if index.facts.short_side else "")
    told = [f"{missing} have none" if missing else "", f"in {static} nothing moves" if static else ""]
    uniform = "; " + " and ".join(filter(None, told)) + ": their frames are chosen uniformly" if any(told) else ""
    return f"motion curves ({how}) of {samples - missing} of {samples} videos{uniform}"
