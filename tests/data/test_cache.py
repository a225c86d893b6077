"""The shard cache: byte limit, least recently used first, shared, atomic."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.cache import ShardCache
from pretrain.data.fetch import SampleReader, read_ahead
from pretrain.data.index import Shard, load_index, load_members
from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from tests.streams import training_stream


@pytest.fixture
def shards(tmp_path: Path) -> list[tuple[str, Shard]]:
    """Six files of 1000 bytes."""
    found = []
    for i in range(6):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i]) * 1000)
        found.append((str(tmp_path / f"{i}.tar"), Shard(f"{i}.tar", 1, 1000, f"hash{i}")))
    return found


def fetch(cache: ShardCache, shard: tuple[str, Shard]) -> Path:
    return Path(cache.local_path(*shard, deadline_s=5))


def test_limit_and_order_of_eviction(tmp_path: Path, shards: list[tuple[str, Shard]]) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 3500)
    paths = [fetch(cache, shard) for shard in shards[:3]]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    assert fetch(cache, shards[0]) == paths[0], "used again"
    fetch(cache, shards[3])
    assert [path.exists() for path in paths] == [True, False, True]
    assert cache.bytes_used() == 3000
    assert paths[0].read_bytes() == bytes(1000)


def test_a_cached_shard_needs_no_source(tmp_path: Path, shards: list[tuple[str, Shard]]) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 3500)
    path = fetch(cache, shards[0])
    os.unlink(shards[0][0])
    assert fetch(ShardCache(str(tmp_path / "cache"), 3500), shards[0]) == path
    repacked = Shard("0.tar", 1, 1000, "another hash")
    with pytest.raises(StorageError):
        cache.local_path(shards[0][0], repacked, deadline_s=1)


def test_many_users_at_once_never_exceed_the_limit(tmp_path: Path, shards: list[tuple[str, Shard]]) -> None:
    caches = [ShardCache(str(tmp_path / "cache"), 2500) for _ in range(8)]
    largest = 0

    def use(number: int) -> None:
        nonlocal largest
        shard = number * 5 % 6
        assert caches[number % 8].read(*shards[shard], 10, 14, deadline_s=20) == bytes([shard]) * 4
        with caches[0]._lock("folder", 20):
            largest = max(largest, caches[0].bytes_used())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(120)))
    assert 2000 <= largest <= 2500


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path, shards: list[tuple[str, Shard]]) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 2500)
    path = fetch(cache, shards[0])
    path.rename(path.with_name(path.name + ".1000.partial"))
    for shard in shards[1:4]:
        fetch(cache, shard)
    assert cache.bytes_used() == 2000
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_shard_of_the_wrong_size_is_not_kept(tmp_path: Path, shards: list[tuple[str, Shard]]) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 2500)
    with pytest.raises(StorageError, match="1000 bytes, its index says 999"):
        cache.local_path(shards[0][0], Shard("0.tar", 1, 999, "x"), deadline_s=1)
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_a_shard_larger_than_the_cache(tmp_path: Path, shards: list[tuple[str, Shard]]) -> None:
    with pytest.raises(DataError, match=r"0\.tar has 1000 bytes, data.cache_gb"):
        fetch(ShardCache(str(tmp_path / "cache"), 900), shards[0])


def test_reads_through_the_cache_are_the_same(tmp_path: Path, two_sources: dict[str, str]) -> None:
    index = load_index(two_sources["a"])
    cache = ShardCache(str(tmp_path), 2 * max(shard.bytes for shard in index.shards))
    direct, cached = SampleReader([index], None, 5.0), SampleReader([index], cache, 5.0)
    for shard, entry in enumerate(index.shards):
        for row in range(entry.samples):
            assert cached.read(0, shard, row) == direct.read(0, shard, row)
    assert 0 < cache.bytes_used() <= cache.limit


def test_read_ahead_is_in_order_and_bounded() -> None:
    started: list[int] = []

    def read(item: int) -> int:
        started.append(item)
        return item * item

    pairs = read_ahead(range(100), read, depth=5)
    for i, (item, future) in zip(range(40), pairs, strict=False):
        assert (item, future.result()) == (i, i * i)
        assert max(started) <= i + 5
    pairs.close()  # type: ignore[attr-defined]
    assert len(started) < 50


def test_read_ahead_passes_errors_on_with_their_item() -> None:
    def read(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results: list[Any] = [future.exception() or future.result() for _, future in read_ahead(range(4), read, depth=2)]
    assert results[:2] == [0, 1] and isinstance(results[2], ValueError) and results[3] == 3


def test_small_caches_are_warned_of(
    make_recipe: Callable[..., Any], two_sources: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(two_sources, cache_dir=str(tmp_path), cache_gb=1e-4)
    stream = training_stream(recipe)
    assert "shards will be fetched again and again" in caplog.text
    assert len(next(stream)["key"]) == 2


def test_a_flipped_bit_in_the_local_copy_is_mended_from_the_source(
    tmp_path: Path, two_sources: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    index = load_index(two_sources["a"])
    cache = ShardCache(str(tmp_path), 10 * max(shard.bytes for shard in index.shards))
    reader, entry = SampleReader([index], cache, 5.0), index.shards[0]
    sound = reader.read(0, 0, 1)
    copy = Path(cache.local_path(storage.join(index.url, entry.name), entry, 5.0))
    data = bytearray(copy.read_bytes())
    begin = int(load_members(index.url, entry).offsets[1])
    data[begin + 600] ^= 1
    copy.write_bytes(data)
    assert reader.read(0, 0, 1) == sound and "were right when read again" in caplog.text
    assert not copy.exists(), "the next read fetches another"
    assert reader.read(0, 0, 1) == sound and copy.read_bytes() != bytes(data)


def test_a_shard_that_is_damaged_at_its_source_is_still_refused(tmp_path: Path, two_sources: dict[str, str]) -> None:
    index = load_index(two_sources["a"])
    shutil.copytree(index.url, tmp_path / "copy")
    entry = index.shards[0]
    begin = int(load_members(index.url, entry).offsets[1])
    with (tmp_path / "copy" / entry.name).open("r+b") as file:
        file.seek(begin + 600)
        file.write(b"\x7f")
    with pytest.raises(DataError, match="has other bytes than when the shard was indexed"):
        SampleReader([load_index(str(tmp_path / "copy"))], None, 5.0).read(0, 0, 1)
