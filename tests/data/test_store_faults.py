"""Streaming through storage that is slow, throttles, resets, hangs, dies and comes back: nothing is lost or seen twice.

Each test compares the keys that came with those of the same stream from a disk, which are arithmetic.
"""

import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.data.stream import TrainStream
from pretrain.data.stream_plan import open_sources
from pretrain.errors import DataError
from pretrain.runtime import outage, retries
from tests.faults import servers
from tests.faults.proxy import FaultProxy
from tests.streams import training_stream

MakeRecipe = Callable[..., Any]
STEPS = 9
OPEN: list[TrainStream] = []


@pytest.fixture
def proxy(server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the server, to which fsspec's s3 goes; new to every test, so that no connection is shared."""
    one = FaultProxy(server.port)
    before = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = servers.settings(one.port, timeout_s=1)
    monkeypatch.setattr(outage.OUTAGES, "_told", -1e9)
    monkeypatch.setattr(retries, "MISSING_S", 2.0)
    yield one
    one.clear()
    end_reads()
    one.close()
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)


@pytest.fixture
def on_s3(proxy: FaultProxy, two_sources: dict[str, str]) -> str:
    """Source b in the store."""
    put(two_sources["b"])
    return "s3://bucket/b"


def put(folder: str) -> None:
    fs = fsspec.filesystem("s3")
    if fs.exists("bucket/b"):
        fs.rm("bucket/b", recursive=True)
    for path in Path(folder).iterdir():
        fs.pipe_file(f"bucket/b/{path.name}", path.read_bytes())
    fs.invalidate_cache()


def open_stream(recipe: Any) -> TrainStream:
    stream = training_stream(recipe)
    OPEN.append(stream)
    return stream


def end_reads() -> None:
    """Wait for what streams read ahead: in the next test it would go on, and complain of a server that is gone."""
    while OPEN:
        OPEN.pop().close()
    end = time.monotonic() + 60
    while any(thread.name.startswith("fetch") for thread in threading.enumerate()):
        assert time.monotonic() < end, "reads go on"
        gc.collect()  # a stream that an error left in its traceback
        time.sleep(0.05)


def keys(stream: Iterator[dict[str, Any]], steps: int = STEPS) -> list[str]:
    """Keys in the order of their coming; no sample may have been replaced."""
    found = []
    for batch in itertools.islice(stream, steps * 2):
        assert batch["bad"] == []
        found += batch["key"]
    return found


@pytest.fixture(scope="module")
def known() -> dict[str, list[str]]:
    """Filled by the first test that needs it: the keys that come from a disk."""
    return {}


@pytest.fixture
def arithmetic(known: dict[str, list[str]], make_recipe: MakeRecipe, two_sources: dict[str, str]) -> list[str]:
    """The keys that must come."""
    if not known:
        known["keys"] = keys(open_stream(make_recipe({"b": two_sources["b"]}, samples=4)))
    return known["keys"]


#: Each by itself is for `make faults`; a stream that any of them spoils is spoilt by all at once.
ALONE: dict[str, dict[str, Any]] = {
    "latency": {"latency_s": (0.0, 0.3)},
    "throttling": {"throttled": 0.3},
    "resets in mid-object": {"cut": 0.25, "cut_after": 3000, "only": r"GET .*\.tar"},
}
FAULTS = [
    *(pytest.param(faults, id=name, marks=pytest.mark.faults) for name, faults in ALONE.items()),
    pytest.param({"latency_s": (0.0, 0.1), "throttled": 0.2, "cut": 0.2}, id="all at once"),
]


@pytest.mark.parametrize("faults", FAULTS)
def test_the_order_is_that_of_arithmetic(
    faults: dict[str, Any], on_s3: str, proxy: FaultProxy, make_recipe: MakeRecipe, arithmetic: list[str]
) -> None:
    stream = open_stream(make_recipe({"b": on_s3}, samples=4, deadline_s=120.0))
    for name, value in faults.items():
        setattr(proxy, name, value)
    assert keys(stream) == arithmetic
    assert proxy.seen["throttled"] + proxy.seen["cut"] > 0 or "latency_s" in faults


@pytest.mark.faults
def test_a_server_killed_and_restarted_in_mid_epoch(
    on_s3: str,
    server: servers.S3Server,
    make_recipe: MakeRecipe,
    arithmetic: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its quicker kind is the hung server below, which is gone and comes back as well."""
    stream = open_stream(make_recipe({"b": on_s3}, samples=4, deadline_s=120.0))
    found = keys(stream, steps=2)

    def start_when_missed() -> None:
        while not any("storage: " in record.message for record in list(caplog.records)):
            time.sleep(0.1)
        server.start()

    with caplog.at_level(logging.WARNING):
        server.kill()
        restart = threading.Thread(target=start_when_missed, daemon=True)
        restart.start()
        found += keys(stream, steps=STEPS - 2)
        restart.join()
    assert found == arithmetic
    lines = [record.message for record in caplog.records if "storage: " in record.message]
    assert len(lines) == 2, lines
    assert "fails" in lines[0] and "trying again for" in lines[0] and "works again after" in lines[1]


def test_a_hung_server_is_waited_for(
    on_s3: str, server: servers.S3Server, make_recipe: MakeRecipe, arithmetic: list[str]
) -> None:
    stream = open_stream(make_recipe({"b": on_s3}, samples=4, deadline_s=120.0))
    found = keys(stream, steps=2)
    server.pause()
    threading.Timer(4.0, server.resume).start()
    found += keys(stream, steps=STEPS - 2)
    assert found == arithmetic


def test_a_store_that_stays_away_is_one_clear_error(on_s3: str, proxy: FaultProxy, make_recipe: MakeRecipe) -> None:
    stream = open_stream(make_recipe({"b": on_s3}, samples=4, deadline_s=4.0))
    keys(stream, steps=1)
    proxy.hangs = True
    begin = time.monotonic()
    with pytest.raises(
        DataError, match=r"s3://bucket/b/\S+: can't be read: check the store .*data.deadline_s.*"
    ) as error:
        keys(stream)
    assert time.monotonic() - begin < 60, "client retries alone nest to half an hour"
    assert "Traceback" not in str(error.value)


@pytest.mark.faults
def test_throttling_without_end_is_one_clear_error(on_s3: str, proxy: FaultProxy, make_recipe: MakeRecipe) -> None:
    """Its quicker kind is the store that stays away, above: the same deadline."""
    stream = open_stream(make_recipe({"b": on_s3}, samples=4, deadline_s=3.0))
    keys(stream, steps=1)
    proxy.throttled = 1.0
    with pytest.raises(DataError, match="can't be read: check the store"):
        keys(stream)


def test_credentials_that_fail_for_a_while(
    on_s3: str, proxy: FaultProxy, make_recipe: MakeRecipe, arithmetic: list[str]
) -> None:
    """Rotated keys: at start a denial is an error at once, later it is waited for."""
    stream = open_stream(make_recipe({"b": on_s3}, samples=4, deadline_s=60.0))
    found = keys(stream, steps=2)
    proxy.denies = True
    threading.Timer(2.0, proxy.clear).start()
    found += keys(stream, steps=STEPS - 2)
    assert found == arithmetic and proxy.seen["denied"] > 0


def test_wrong_credentials_come_at_once(on_s3: str, proxy: FaultProxy, make_recipe: MakeRecipe) -> None:
    fsspec.config.conf["s3"]["secret"] = "wrong"
    begin = time.monotonic()
    with pytest.raises(DataError, match="access is denied: check the credentials.*PermissionError"):
        open_sources(make_recipe({"b": on_s3}, deadline_s=300.0).data)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "of the same size"])
def test_a_shard_that_is_not_the_index_s(
    damage: str, on_s3: str, two_sources: dict[str, str], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    fs = fsspec.filesystem("s3")
    shard = fs.cat_file("bucket/b/00001.tar")
    if damage == "missing":
        fs.rm_file("bucket/b/00001.tar")
    else:
        changed = {"cut": shard[:-2000], "longer": shard + bytes(10240)}
        fs.pipe_file("bucket/b/00001.tar", changed.get(damage, shard.replace(b"mdat", b"MDAT")))
    fs.invalidate_cache()
    begin = time.monotonic()
    found = r"(can't be read: it is listed|\d+ bytes, its index says \d+|sample \S+ has other bytes)"
    with pytest.raises(DataError, match=f"s3://bucket/b/00001.tar: {found}.*--check"):
        keys(open_stream(make_recipe({"b": on_s3}, samples=4, deadline_s=300.0)))
    assert time.monotonic() - begin < 60


def test_a_cached_shard_is_fetched_whole_through_faults(
    on_s3: str, proxy: FaultProxy, make_recipe: MakeRecipe, arithmetic: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe({"b": on_s3}, samples=4, deadline_s=120.0, cache_dir=str(tmp_path / "cache"))
    stream = open_stream(recipe)
    proxy.cut, proxy.cut_after, proxy.throttled = 0.4, 5000, 0.2
    assert keys(stream) == arithmetic
    proxy.cut = proxy.throttled = 0.0
    proxy.refuses = True
    assert keys(open_stream_offline(recipe, proxy)) == arithmetic, "then no byte comes from the store"


def open_stream_offline(recipe: Any, proxy: FaultProxy) -> TrainStream:
    proxy.only = r"GET .*\.tar"
    return open_stream(recipe)
