"""The index's shards: a sequence like any other, in one array that processes share."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing

from pretrain.data.index import (
    Keys,
    MemberTable,
    Shard,
    ShardIndex,
    ShardTable,
    load_index,
    load_members,
    write_index,
    write_members,
)
from pretrain.data.members import Members
from pretrain.errors import DataError, SampleError

SHARDS = [Shard("a.tar", 3, 10_240, "ab" * 32), Shard("deep/ünï.tar", 1, 1 << 40, ""), Shard("c.tar", 0, 0, "cd")]


def test_a_table_is_a_sequence_of_its_shards() -> None:
    table = ShardTable(iter(SHARDS))
    assert list(table) == SHARDS and len(table) == 3
    assert table[-1] == SHARDS[-1] and list(table[:2]) == SHARDS[:2]
    assert table == ShardTable(SHARDS) and table != ShardTable(SHARDS[:2]) and table != SHARDS
    assert table.samples.tolist() == [3, 1, 0]
    assert all(type(value) in (int, str) for value in vars(table[0]).values())
    with pytest.raises(IndexError):
        table[3]


def test_no_shards_are_a_table_too() -> None:
    table = ShardTable([])
    assert list(table) == [] and pickle.loads(pickle.dumps(table)) == table
    assert ShardIndex("somewhere", table).samples == 0


def test_an_index_comes_back_as_it_was_written(tmp_path: Path) -> None:
    index = ShardIndex(str(tmp_path), ShardTable(SHARDS))
    write_index(index)
    assert load_index(str(tmp_path)) == index
    assert pickle.loads(pickle.dumps(index)) == index


@pytest.mark.parametrize(
    "wrong",
    [{"name": 5}, {"samples": "many"}, {"bytes": 1 << 70}, {"sha256": None}, {"samples": None}, {"other": 1},
     {"samples": "1"}, {"samples": 1.0}, {"samples": True}, {"bytes": -1}],
)  # fmt: skip
def test_a_damaged_entry_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_index(ShardIndex(str(tmp_path), ShardTable(SHARDS)))
    content = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    content["shards"][1] |= wrong
    (tmp_path / "index.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"index.json: damaged entry .*--index-only"):
        load_index(str(tmp_path))


def test_keys_are_a_sequence_of_texts(tmp_path: Path) -> None:
    names = ["0001", "deep/ünï", "caf\udce9", ""]
    keys = Keys(names)
    assert list(keys) == names and keys[-2] == names[-2] and keys[1:3] == names[1:3] and type(keys[0]) is str
    four = np.arange(4)
    write_members(str(tmp_path), "a.tar", MemberTable(tuple(names), four, four))
    assert list(load_members(str(tmp_path), SHARDS[0]).keys) == names


@pytest.mark.parametrize("keys", [None, [1, 2], 3])
def test_a_table_without_keys_is_named(tmp_path: Path, keys: Any) -> None:
    (tmp_path / "a.members.json").write_text(json.dumps({"keys": keys, "offsets": [1], "sizes": [1]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"a.members.json: no readable member table .*--index-only"):
        load_members(str(tmp_path), SHARDS[0])


def _overwrite(table: ShardTable, expected: list[str], row: int) -> None:
    assert [shard.name for shard in table] == expected
    table._rows["samples"][row] = 77


def test_processes_share_the_table() -> None:
    table = ShardTable(SHARDS)
    names, spawn = [shard.name for shard in SHARDS], torch.multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_overwrite, args=(table, names, row)) for row in (0, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert table.samples.tolist() == [77, 1, 77], "what one process writes, others read"


@pytest.mark.parametrize("name", ["../a.tar", "/a.tar", "x/../../a.tar", "s3://other/a.tar"])
def test_an_index_names_no_shard_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    write_index(ShardIndex(str(tmp_path), ShardTable([Shard(name, 1, 1, "ab" * 32)])))
    with pytest.raises(DataError, match="index.json: damaged entry .*folder"):
        load_index(str(tmp_path))


def test_json_that_is_nested_deep_is_damage(tmp_path: Path) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    (tmp_path / "index.json").write_bytes(deep)
    with pytest.raises(DataError, match="nested too deep"):
        load_index(str(tmp_path))
    (tmp_path / "a.members.json").write_bytes(deep)
    with pytest.raises(DataError, match="nested too deep"):
        load_members(str(tmp_path), SHARDS[0])
    sample = Members({"json": deep, "boxes.json": deep})
    with pytest.raises(SampleError, match="nested too deep"):
        _ = sample.facts
    with pytest.raises(SampleError, match="nested too deep"):
        sample.boxes()
    with pytest.raises(SampleError, match="at most 16777216 are read"):
        _ = Members({"json": b'{"a": "' + b"x" * (16 << 20) + b'"}'}).facts
