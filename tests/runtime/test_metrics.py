import json
from pathlib import Path

import pytest

from pretrain.runtime.metrics import JsonLines, keep_records, read_records


def write(path: Path, *steps: int) -> None:
    lines = JsonLines(path)
    for step in steps:
        lines.write({"step": step, "train/loss": step / 3})
    lines.close()


def test_records_come_back_exactly(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", 1, 2)
    write(tmp_path / "m.jsonl", 3)
    assert [record["train/loss"] for record in read_records(tmp_path / "m.jsonl")] == [1 / 3, 2 / 3, 3 / 3]


def test_a_line_cut_by_a_kill_is_dropped_and_later_steps_are_too(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 1, 2, 3)
    path.write_text(path.read_text() + '{"step": 4, "tr')
    keep_records(path, lambda record: record["step"] <= 2)
    write(path, 3, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_numbers_that_json_has_not_become_words(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"step": 1, "train/loss": float("nan"), "optim/grad_norm": float("inf")})
    text = (tmp_path / "m.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda word: 1 / 0)
    assert (float(record["optim/grad_norm"]), record["train/loss"]) == (float("inf"), "nan")


def test_no_file_is_no_error(tmp_path: Path) -> None:
    keep_records(tmp_path / "none.jsonl", lambda record: True)
    assert list(read_records(tmp_path / "none.jsonl")) == []


DAMAGE = [b"\0" * 40, b'{"step": 2, "tra', b"\xff\xfe", b"[2]", b"{}", b'{"step": "2"}', b"2", b"[" * 100_000, b""]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: repr(damage[:9]))
def test_a_damaged_line_costs_only_itself(damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 1, 2, 3, 4)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    assert [record["step"] for record in read_records(path, ("step",))] == [1, 3, 4]
    assert f"{path}:2: damaged line left out" in caplog.text
    keep_records(path, lambda record: record["step"] <= 3, ("step",))
    write(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]
    assert (tmp_path / "m.jsonl.damaged").read_bytes() == before, "nothing is thrown away"


def test_many_damaged_lines_are_told_in_a_few(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"x\n" * 300)
    assert list(read_records(path)) == [] and len(caplog.records) == 6 and "300 damaged" in caplog.text


def test_a_record_does_not_join_a_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 1)
    path.write_text(path.read_text() + '{"step": 2, "tr')
    write(path, 3)
    assert [record["step"] for record in read_records(path)] == [1, 3]
