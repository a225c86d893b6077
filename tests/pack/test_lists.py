"""List files of the official repositories and manifests."""

import json
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pretrain.commands.pack import main
from pretrain.data.pack.discover import Item, gather, with_sizes
from pretrain.data.pack.lists import ListLine, parse_list
from pretrain.errors import DataError, RecipeError


@pytest.mark.parametrize(
    ("list_format", "line", "expected"),
    [
        ("auto", "a/b.mp4 17", ListLine("a/b.mp4", "a/b.mp4", 17, None, False)),
        ("v1", "a/b 17", ListLine("a/b.mp4", "a/b.mp4", 17, None, False)),
        ("auto", "my clip.webm 3", ListLine("my clip.webm", "my clip.webm", 3, None, False)),
        ("auto", "a/b.mp4 0 -1", ListLine("a/b.mp4", "a/b.mp4", None, None, False)),
        ("v2", "a/b.mp4 0 -1 extra columns", ListLine("a/b.mp4", "a/b.mp4", None, None, False)),
        ("v2", "frames/x 5 30", ListLine("frames/x", "frames/x", None, (5, 30), True)),
        ("frames", "frames/x 30 5", ListLine("frames/x", "frames/x", 5, (None, 30), True)),
        ("auto", "alone.mp4", ListLine("alone.mp4", "alone.mp4", None, None, False)),
        ("auto", "a.mp4\t2", ListLine("a.mp4", "a.mp4", 2, None, False)),
    ],
)
def test_official_line(list_format: str, line: str, expected: ListLine) -> None:
    assert parse_list("train.csv", line + "\n", list_format) == [expected]  # type: ignore[arg-type]


def test_all_wrong_lines_are_reported_with_their_place() -> None:
    text = "good.mp4 1\n\nbad.mp4 running\nfolder 1 30\n"
    with pytest.raises(RecipeError) as error:
        parse_list("lists/train.csv", text)
    first, second = error.value.problems
    assert first.startswith("lists/train.csv:3:") and "class number" in first
    assert second.startswith("lists/train.csv:4:") and "--list-format" in second


@pytest.mark.parametrize(
    ("list_format", "line"), [("v2", "a.mp4 3"), ("frames", "f 3"), ("v2", "f 1 0"), ("frames", "f 0 1")]
)
def test_line_of_another_format(list_format: str, line: str) -> None:
    with pytest.raises(RecipeError, match="train.csv:1"):
        parse_list("train.csv", line, list_format)  # type: ignore[arg-type]


def test_empty_list() -> None:
    with pytest.raises(RecipeError, match="no line"):
        parse_list("train.csv", "\n\n")


@pytest.mark.parametrize(("name", "text"), [("list.csv", "path,label\n"), ("list.jsonl", "\n")])
def test_a_manifest_without_a_video(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match="names no video; one a line"):
        gather([str(tmp_path / name)])


def test_home_is_meant_by_a_tilde_in_lists_and_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "list.txt").write_text("~/a.mp4 0\nb.mp4 1\n")
    found = [item.path for item in gather([str(tmp_path / "list.txt")], "~/data")]
    assert found == ["/home/me/a.mp4", "/home/me/data/b.mp4"]


def test_paths_start_at_data_root_or_beside_the_list(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a.mp4 1\n/abs/b.mp4 2\n")
    beside = gather([str(tmp_path / "train.csv")])
    rooted = gather([str(tmp_path / "train.csv")], data_root="s3://bucket/data")
    assert [item.path for item in beside] == [f"{tmp_path}/a.mp4", "/abs/b.mp4"]
    assert [item.path for item in rooted] == ["s3://bucket/data/a.mp4", "/abs/b.mp4"]
    assert [item.name for item in rooted] == ["a.mp4", "/abs/b.mp4"]


def test_csv_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('path,label,split,key\n"a, b.mp4",7,train,first\nc.mp4,run,test,\n')
    one, two = gather([str(tmp_path / "m.csv")])
    assert (one.name, one.label, one.key, one.meta) == ("a, b.mp4", 7, "first", {"split": "train"})
    assert (two.name, two.label, two.key, two.meta) == ("c.mp4", "run", "", {"split": "test"})
    (tmp_path / "told.csv").write_text('path,caption\na.mp4,"two\nlines\u2028long"\nb.mp4,\n')
    told, silent = gather([str(tmp_path / "told.csv")])
    assert (told.meta, silent.meta) == ({"caption": "two\nlines\u2028long"}, {})


def test_jsonl_manifest(tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "label": "x", "caption": ["one", "two"]}, {"path": "f", "start": 3, "frames": 10}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = gather([str(tmp_path / "m.jsonl")])
    assert one.meta == {"caption": ["one", "two"]}
    assert two.is_folder and two.frames == (3, 10)


def test_wrong_manifest_rows(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "a.mp4"}\n{"label": 3}\nnot json\n')
    (tmp_path / "m.csv").write_text("path,label\na.mp4,1\nb.mp4,1,2\n")
    with pytest.raises(RecipeError) as error:
        gather([str(tmp_path / "m.jsonl"), str(tmp_path / "m.csv"), str(tmp_path / "nowhere")])
    places = [problem.split(": ")[0] for problem in error.value.problems]
    assert places == [f"{tmp_path}/m.jsonl:2", f"{tmp_path}/m.jsonl:3", f"{tmp_path}/m.csv:3", f"{tmp_path}/nowhere"]


class DeadFileSystem(MemoryFileSystem):
    """A store that answers with an error which no second attempt cures."""

    protocol = "dead"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        raise ValueError("no answer")

    def find(self, path: str, **kwargs: Any) -> dict[str, Any]:
        raise ValueError("no answer")

    def _open(self, path: str, *arguments: Any, **kwargs: Any) -> Any:
        raise ValueError("no answer")


fsspec.register_implementation("dead", DeadFileSystem, clobber=True)


def test_a_store_that_does_not_answer_is_no_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for item in (Item("dead://b/a.mp4", "a"), Item("dead://b/a", "a", is_folder=True), Item("dead://b/z.zip@/a", "a")):
        with pytest.raises(DataError, match="no answer"):
            with_sizes([item])
    (tmp_path / "hacs.csv").write_text("classname,youtube_id,subset,start,end,label\nskiing,aaa,training,1.5,3.5,1\n")
    for sources in (["dead://b/z.zip"], [str(tmp_path / "hacs.csv"), "--data-root", "dead://b"]):
        assert main([sources[0], str(tmp_path / "out"), *sources[1:], "--workers", "0"]) == 1
        assert "no answer" in capsys.readouterr().err


def test_what_is_not_there_has_no_size(tmp_path: Path) -> None:
    """An archive that ends in capital letters is one, and one that is not there is no traceback."""
    with zipfile.ZipFile(tmp_path / "A.ZIP", "w") as out:
        out.writestr("x/b.npy", b"12345")
    (tmp_path / "m.csv").write_text("path\nx/b.npy\nx/c.npy\n")
    items = with_sizes(gather([str(tmp_path / "m.csv")], data_root=str(tmp_path / "A.ZIP")))
    assert [(item.path.rpartition("@/")[2], item.size) for item in items] == [("x/b.npy", 5), ("x/c.npy", 0)]
    assert [item.size for item in gather([str(tmp_path / "A.ZIP")])] == [5]
    names = ("gone.zip@/a.npy", "gone.npy", "gone")
    items = [Item(str(tmp_path / name), name, is_folder=name == "gone") for name in names]
    assert with_sizes(items) == items


def test_a_caption_with_a_line_separator_is_one_line(tmp_path: Path) -> None:
    row = {"path": "a.mp4", "caption": "one\u2028two"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (item,) = gather([str(tmp_path / "m.jsonl")])
    assert item.meta == {"caption": "one\u2028two"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("a/b.mp4,3", "separated by a comma"),
        ("a/b.mp4, running", "separated by a comma"),
        ("a/b.mp4|3", "separated by a comma, pipe"),
        ("a/b.mp4;3", "separated by a comma, pipe"),
        (r"D:\\videos\\b.mp4 3", "backslashes"),
        (r"videos\\b.mp4", "backslashes"),
        ("filename,label", "a header"),
        ("video label", "a header"),
        ('"video_path"\t"class_id"', "a header"),
    ],
)
def test_lists_of_another_look_are_described(line: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        parse_list("train.csv", line + "\na.mp4 3\n")
    assert "train.csv:1:" in str(error.value)


@pytest.mark.parametrize("line", ["a, b/c.mp4 3", "video/label.mp4 3", "a,b.mp4", "video 1.mp4 3", "x;y/c.mp4 0 -1"])
def test_commas_in_paths_are_paths(line: str) -> None:
    assert parse_list("train.csv", line)[0].path.startswith(line[:3])
