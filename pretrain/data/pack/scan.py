"""Index tar shards by reading their headers: our own after writing, foreign WebDataset shards in place.

One code path for both, so that a shard's entry never depends on who wrote it.
"""

import hashlib
import logging
import tarfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from pretrain.data.index import (
    MemberTable,
    Shard,
    ShardIndex,
    ShardTable,
    load_index,
    table_bytes,
    write_index,
    write_members,
)
from pretrain.data.media import LINK_ENDING, Kind, kind_of_ending
from pretrain.errors import DataError, TubeletError
from pretrain.runtime import storage

logger = logging.getLogger(__name__)

CHUNK = 32 << 20
BLOCK = 512


class HashingReader:
    """A forward-only file over `url` that hashes all it hands out; each range read is retried by storage.

    Attributes:
        sha256: hash of everything read so far.
        bytes: size of the whole file.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.bytes = storage.size(url)
        self.sha256 = hashlib.sha256()
        self._next = 0
        self._chunk = memoryview(b"")
        # Kept until a sample's end is known, so that its CRC-32 and the shard's sha256 come from one read of the file.
        self._recent, self._recent_from = bytearray(), 0

    def read(self, count: int = -1) -> bytes:
        """Read up to `count` bytes (all that is left for -1), fewer only at the end."""
        parts = []
        while count and (self._chunk or self._fill()):
            piece = self._chunk if count < 0 else self._chunk[:count]
            self._chunk = self._chunk[len(piece) :]
            count -= len(piece) if count > 0 else 0
            parts.append(piece)
            self._recent += piece
        return b"".join(parts)

    def checksum(self, begin: int, end: int) -> int:
        """Compute the CRC-32 of the bytes [begin, end), read already; bytes before `end` are forgotten."""
        recent = memoryview(self._recent)
        found = zlib.crc32(recent[begin - self._recent_from : end - self._recent_from])
        # A bytearray can't shrink while a view of it exists.
        recent.release()
        del self._recent[: end - self._recent_from]
        self._recent_from = end
        return found

    def finish(self) -> None:
        """Hash the rest of the file, which nobody reads."""
        while self._fill():
            pass
        self._chunk = memoryview(b"")

    def _fill(self) -> bool:
        end = min(self._next + CHUNK, self.bytes)
        if self._next == end:
            return False
        data = storage.read_bytes(self.url, self._next, end)
        self.sha256.update(data)
        self._chunk, self._next = memoryview(data), end
        return True


@dataclass
class _Sample:
    key: str
    start: int
    end: int
    extensions: list[str] = field(default_factory=list)
    checksum: int = 0

    @property
    def kinds(self) -> set[Kind | None]:
        return {kind_of_ending(extension) for extension in self.extensions}

    @property
    def named_videos(self) -> list[str]:
        """Endings of its videos, where each has a name before the ending proper; else none."""
        videos = [extension for extension in self.extensions if kind_of_ending(extension) == "video"]
        return videos if all("." in extension for extension in videos) else []

    @property
    def is_link(self) -> bool:
        return LINK_ENDING in self.extensions


def scan_shard(url: str, name: str, media_only: bool = True) -> tuple[Shard, MemberTable, list[str]]:
    """Read the tar `name` in the folder `url` once: its entry, where its samples lie, and a line for each oddity.

    Left out is, unless `media_only` is false: of a shard that holds videos every sample without one; of one without
    videos every sample without image, sound, array or raster; of one without any of these what has no text.

    Raises:
        DataError: not a readable tar file, compressed, a sample's members are not adjacent, or two have one name.
    """
    where = storage.join(url, name)
    reader = HashingReader(where)
    samples = _samples(where, reader)
    _check_unique(where, samples)
    reader.finish()  # what follows the end marker belongs to the hash
    kept = _with_media(samples) if media_only else samples
    members = MemberTable(
        tuple(sample.key for sample in kept),
        np.array([sample.start for sample in kept], dtype=np.int64),
        np.array([sample.end - sample.start for sample in kept], dtype=np.int64),
        np.array([sample.checksum for sample in kept], dtype=np.uint32),
        any(sample.is_link for sample in kept),
    )
    table = hashlib.sha256(table_bytes(members)).hexdigest()
    shard = Shard(name, len(kept), reader.bytes, reader.sha256.hexdigest(), table)
    return shard, members, [*_left_out(shard, len(samples) - len(kept)), *_several_videos(name, kept)]


def _left_out(shard: Shard, count: int) -> list[str]:
    """Say how many samples of a shard its index leaves out, and why."""
    what = "none of the others' kind" if shard.samples else "no video, image, sound, array, raster or text"
    line = f"{shard.name}: {count} of {count + shard.samples} samples hold {what} and are left out"
    return [line] if count else []


def _several_videos(name: str, samples: list[_Sample]) -> list[str]:
    """Say which samples hold several videos of which none is the main one: they may be samples that share a key."""
    found = [(sample, videos) for sample in samples if len(videos := sample.named_videos) > 1]
    if not found:
        return []
    sample, videos = max(found, key=lambda pair: len(pair[1]))
    return [
        f"{name}: {len(found)} of {len(samples)} samples hold several videos, {sample.key!r} {len(videos)} of them "
        f"({videos[0]!r}, {videos[1]!r} ...): a name's first dot ends its key. The first is trained on unless the "
        "sample's json names another as `member`; samples of their own need other names (- for the dot)"
    ]


def _with_media(samples: list[_Sample]) -> list[_Sample]:
    """Select samples that hold what their shard is made of. Videos come first because indexes have always been made so:
    that of a shard must stay what it was, to the fingerprint."""
    for wanted in ({"video"}, {"image", "sound", "array", "raster"}, {"text"}):
        kept = [sample for sample in samples if sample.is_link or sample.kinds & wanted]
        if kept:
            return kept
    return []


def _samples(where: str, reader: HashingReader) -> list[_Sample]:
    """Group neighbouring members of one key, as webdataset does."""
    from webdataset.tariterators import base_plus_ext  # imports torch: seconds that --help and workers can do without

    samples: list[_Sample] = []
    end = 0
    try:
        # "r|" never seeks: the hashing reader can't go back, and a store is asked for each byte once.
        with tarfile.open(fileobj=cast(Any, reader), mode="r|", bufsize=1 << 20) as tar:
            for member in tar:
                cast(Any, tar).members.clear()  # tarfile remembers every member otherwise
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                key, extension = base_plus_ext(member.name)
                if not member.isreg() or key is None:
                    continue
                if not samples or samples[-1].key != key:
                    _finish(samples, reader)
                    samples.append(_Sample(key, member.offset, end))
                samples[-1].extensions.append(extension)
                samples[-1].end = end
            _finish(samples, reader)
    except tarfile.TarError as error:
        raise DataError(
            f"{where}: not a plain, whole tar file ({error}); compressed shards must be unpacked first, "
            "a cut one must be copied again"
        ) from error
    _check_end(where, end, reader.bytes)
    return samples


def _finish(samples: list[_Sample], reader: HashingReader) -> None:
    """Add the checksum of the last sample, of which all members are known."""
    if samples:
        samples[-1].checksum = reader.checksum(samples[-1].start, samples[-1].end)


def _check_end(where: str, end: int, size: int) -> None:
    """Look for the end marker: tarfile takes a cut or overwritten header for the end of the file as well."""
    marker = storage.read_bytes(where, end, end + BLOCK) if end + BLOCK <= size else b""
    if marker != bytes(BLOCK):
        raise DataError(
            f"{where}: no tar end marker after the last readable member, at byte {end}: cut or overwritten; "
            "copy the shard again"
        )


def _check_unique(where: str, samples: list[_Sample]) -> None:
    """Refuse keys of several samples, and samples of several files of one name: nobody can tell which is meant."""
    split = {key: count for key, count in Counter(sample.key for sample in samples).items() if count > 1}
    if split:
        raise DataError(
            f"{where}: key {_first_of(split)}: the files of a sample do not lie next to each other, or several samples "
            "share a key; webdataset can't group them either: write the shard again, with tar --sort=name or with a "
            "key of its own for each sample"
        )
    # Without case, as webdataset reads endings.
    endings = {sample.key: Counter(map(str.lower, sample.extensions)).most_common(1)[0] for sample in samples}
    double = {f"{key}.{ending}": count for key, (ending, count) in endings.items() if count > 1}
    if double:
        raise DataError(
            f"{where}: file {_first_of(double)}: a sample has one file of each ending, and webdataset refuses others "
            "too: write the shard again, with a key of its own for each sample"
        )


def _first_of(counts: dict[str, int]) -> str:
    name, count = next(iter(counts.items()))
    return f"{name!r} occurs {count} times" + (f" ({len(counts) - 1} more the like)" if len(counts) > 1 else "")


def index_folder(url: str, threads: int = 8) -> tuple[ShardIndex, list[str]]:
    """Index every `*.tar` below the folder `url` in place; the shards themselves are not touched.

    Returns:
        The index, as written to `index.json`, and one line for each oddity: samples that are left out, or hold several
        videos.

    Raises:
        DataError: no shards there, or unusable ones: all of them are listed.
    """
    names = [name for name in storage.find(url) if name.endswith(".tar")]
    if not names:
        raise DataError(f"{url}: no .tar files below it; give the folder that holds the shards")
    problems: list[str] = []
    notes: list[str] = []
    shards: list[Shard] = []
    with ThreadPoolExecutor(threads) as pool:
        for name, result in zip(names, pool.map(lambda name: _try_scan(url, name), names), strict=True):
            if isinstance(result, str):
                problems.append(result)
                continue
            shard, members, oddities = result
            write_members(url, name, members)
            shards.append(shard)
            notes += oddities
    if problems:
        raise DataError("\n".join(problems))
    index = ShardIndex(url, ShardTable(shards))
    write_index(index)
    return load_index(url), notes


def _try_scan(url: str, name: str) -> tuple[Shard, MemberTable, list[str]] | str:
    try:
        return scan_shard(url, name)
    except TubeletError as error:
        return str(error)
