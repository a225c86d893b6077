"""From a location (source, shard, row) to the bytes of one sample, read ahead by threads.

A sample's members are adjacent in its shard, so one range read fetches it, whatever the storage.
"""

import functools
import io
import logging
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pretrain.data.cache import ShardCache
from pretrain.data.index import MemberTable, Shard, ShardIndex, load_members, members_name, store_error
from pretrain.data.linked_video import VideoFile, open_link
from pretrain.data.media import LINK_ENDING, SPAN_ENDING, extension_of
from pretrain.data.motion_tables import Curve, MotionTables
from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.retries import undamaged
from pretrain.runtime.untrusted import name_text

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: Reads in flight at once, most.
THREADS = 16


@dataclass(frozen=True)
class RawSample:
    """A sample as it lies in the shard.

    Attributes:
        key: that the index promises.
        url: of the shard.
        data: whole tar members.
        linked: files that its link names, by ending; they lie outside of the shard (pack.py --in-place).
        motion: its motion curve, from the table beside the shard, where the reader was asked for it and there is one.
    """

    key: str
    url: str
    data: bytes
    linked: Mapping[str, VideoFile] = field(default_factory=dict)
    motion: Curve | None = None


class SampleReader:
    """Reader of the samples of several data sets; safe to use from many threads.

    Args:
        indexes: The data sets, in the recipe's order.
        cache: Local cache for whole shards, or None to read ranges straight from the source.
        deadline_s: Longest time of one read, retries included, seconds.
        tables: Member tables kept in memory.
        motion: Numbers of the data sets whose samples come with their motion curves.
    """

    def __init__(
        self,
        indexes: list[ShardIndex],
        cache: ShardCache | None,
        deadline_s: float,
        tables: int = 512,
        motion: Collection[int] = (),
    ) -> None:
        self._indexes, self._cache, self._deadline_s = indexes, cache, deadline_s
        # Bounded: a worker that kept the table of every shard would grow with the data set.
        self._members = functools.lru_cache(maxsize=tables)(self._load_members)
        self._motion = {source: MotionTables(indexes[source], deadline_s, tables) for source in motion}

    def read(self, source: int, shard: int, row: int) -> RawSample:
        """Fetch one sample.

        Raises:
            DataError: the storage does not hand it out until the deadline, or holds another shard than the index says.
                Neither is a matter of this sample, which another could stand in for: the run must wait, or stop.
            SampleError: "missing" where the sample is a link to a video that is not there.
        """
        index = self._indexes[source]
        entry = index.shards[shard]
        url = storage.join(index.url, entry.name)
        members = self._members(source, shard)
        begin, end = int(members.offsets[row]), int(members.offsets[row] + members.sizes[row])
        try:
            if self._cache is None:
                # The index could be read, so a denial now may be one that passes: tried again until the deadline.
                data = storage.read_bytes(url, begin, end, self._deadline_s, denied_for_good=False)
            else:
                data = self._cache.read(url, entry, begin, end, self._deadline_s)
        except StorageError as error:
            raise store_error(url, error) from error
        # The size alone does not tell a shard that was replaced by another of the same size, and its sha256 would take
        # reading all of it, which ranges are there to avoid. zlib takes 0.2 ms a megabyte.
        wanted = None if members.checksums is None else int(members.checksums[row])
        if wanted is not None and zlib.crc32(data) != wanted:
            data = self._read_again(url, entry, data, begin, wanted)
        if wanted is not None and zlib.crc32(data) != wanted:
            or_table = "" if entry.members else f", or {members_name(entry.name)} was changed"
            raise DataError(
                f"{url}: sample {members.keys[row]} has other bytes than when the shard was indexed: it is damaged, or "
                f"another shard of the same size{or_table}. "
                f"Copy the shard again{' and empty the cache' if self._cache else ''}; "
                f"launch/pack.py --check {index.url} --hashes-only finds all that differ"
            )
        linked = self._linked(data) if members.linked else {}
        # Here and not while decoding, whose deadline is its own.
        motion = self._motion[source].curve(shard, row) if source in self._motion else None
        return RawSample(members.keys[row], url, data, linked, motion)

    def _read_again(self, url: str, entry: Shard, data: bytes, begin: int, wanted: int) -> bytes:
        """Read a range with a wrong checksum again, from the source: the local copy may be damaged, and goes then."""
        end = begin + len(data)

        def read() -> bytes:
            return storage.read_bytes(url, begin, end, self._deadline_s, denied_for_good=False)

        try:
            data = undamaged(read, lambda data: zlib.crc32(data) == wanted, data)
        except StorageError as error:
            raise store_error(url, error) from error
        if zlib.crc32(data) == wanted:
            logger.warning("%s: bytes %d to %d arrived damaged, and were right when read again", url, begin, end)
            if self._cache is not None:
                self._cache.forget(url, entry)
        return data

    def _linked(self, data: bytes) -> dict[str, VideoFile]:
        """Open the video that a sample's link names, by its ending; one that is gone is a matter of this sample."""
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            plain = ((member.name.rsplit(".", 1)[-1], tar.extractfile(member)) for member in tar if member.isfile())
            files = {ending: file.read() for ending, file in plain if file and ending in (LINK_ENDING, SPAN_ENDING)}
        where = name_text(files[LINK_ENDING])
        return {extension_of(where): open_link(where, files.get(SPAN_ENDING), self._deadline_s)}

    def key(self, source: int, shard: int, row: int) -> str:
        """Look up a sample's key in the member table, or its row where the table can't be read; for reports."""
        try:
            return self._members(source, shard).keys[row]
        except DataError:
            return f"row {row}"

    def _load_members(self, source: int, shard: int) -> MemberTable:
        index = self._indexes[source]
        entry = index.shards[shard]
        try:
            members = load_members(index.url, entry, self._deadline_s)
        except StorageError as error:
            raise store_error(storage.join(index.url, members_name(entry.name)), error) from error
        lengths = {len(members.keys), len(members.offsets), len(members.sizes)}
        lengths |= set() if members.checksums is None else {len(members.checksums)}
        if lengths != {entry.samples}:
            raise DataError(
                f"{entry.name}: columns of the member table list {sorted(lengths)} samples, index.json "
                f"{entry.samples}; run launch/pack.py --index-only {index.url}"
            )
        self._check_size(index, entry)
        return members

    def _check_size(self, index: ShardIndex, entry: Shard) -> None:
        """Compare a shard's size with the index each time it is opened, against samples that silently are others."""
        url = storage.join(index.url, entry.name)
        try:
            found = storage.size(url, self._deadline_s, denied_for_good=False)
        except StorageError as error:
            raise store_error(url, error) from error
        if found != entry.bytes:
            raise DataError(
                f"{url}: {found} bytes, its index says {entry.bytes}: cut, or another file of the same name. Copy the "
                f"shard again; launch/pack.py --check {index.url} --hashes-only finds all that differ"
            )


def read_ahead(items: Iterable[T], read: Callable[[T], R], depth: int) -> Iterator[tuple[T, Future[R]]]:
    """Pair every item with the future of its read; up to `depth` reads run or lie ready ahead of the consumer."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    pool = ThreadPoolExecutor(min(depth, THREADS), thread_name_prefix="fetch")
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) >= depth:
                yield waiting.popleft()
        yield from waiting
    finally:
        # Not waited for: a read that hangs would hold the worker until its deadline.
        pool.shutdown(wait=False, cancel_futures=True)
