import json
from pathlib import Path

import pytest

from pretrain.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    describe_file,
    parse_manifest,
    problems,
    read_manifest,
    write_manifest,
)
from pretrain.errors import CheckpointError

FILES = {"a/weights.pt": b"weights" * 1000, "a/optimizer.pt": b"moments" * 10, "state.json": b"{}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    write_manifest(tmp_path, Manifest(3, tuple(describe_file(tmp_path, name) for name in FILES)))
    return tmp_path


def test_untouched_checkpoint_verifies(folder: Path) -> None:
    assert problems(folder) == []
    assert read_manifest(folder).step == 3


def test_a_flipped_bit_is_found_by_exactly_the_rank_that_reads_the_file(folder: Path) -> None:
    path = folder / "a/weights.pt"
    data = bytearray(path.read_bytes())
    data[4321] ^= 1
    path.write_bytes(data)
    found = [problems(folder, part, 3) for part in range(3)]
    assert [bool(lines) for lines in found] == [True, False, False]
    assert "a/weights.pt: content differs" in found[0][0]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_missing_and_cut_files_are_found_by_every_rank(folder: Path, part: int) -> None:
    (folder / "state.json").unlink()
    (folder / "a/optimizer.pt").write_bytes(b"mom")
    assert [line.split(": ")[1] for line in problems(folder, part, 3)] == ["3 bytes instead of 70", "missing"]


def test_a_folder_without_manifest_was_never_finished(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert "never finished" in problems(folder)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "step": 1, "files": [{"path": "x"}]}'])
def test_damaged_manifest_is_an_error_not_a_crash(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="unreadable"):
        read_manifest(folder)


def test_manifest_of_another_version_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"version": 99, "step": 1, "files": []}')
    assert "version 99" in problems(folder)[0]


def test_extra_files_such_as_keep_do_no_harm(folder: Path) -> None:
    (folder / "keep").touch()
    assert problems(folder) == []


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/x", "a/../../x", "..", ".", "", "a//b", "a/", "./a", "s3://bucket/x", "C:\\x", "a\0b", 7, None],
)
def test_a_manifest_names_no_file_outside_of_its_checkpoint(name: object) -> None:
    files = [{"path": name, "bytes": 1, "sha256": "0" * 64}]
    with pytest.raises(CheckpointError, match="manifest.json: unreadable"):
        parse_manifest(json.dumps({"version": 1, "step": 1, "files": files}).encode(), "manifest.json")


def test_a_manifest_that_is_nested_deep_is_damaged() -> None:
    with pytest.raises(CheckpointError, match="nested too deep"):
        parse_manifest(b'{"version": ' + b"[" * 200_000, "manifest.json")
