import json
from pathlib import Path

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
