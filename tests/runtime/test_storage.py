"""Storage: whole files, retries, one deadline over clients that hang."""

import importlib.util
import itertools
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pretrain.errors import StorageError
from pretrain.runtime import retries, storage
from pretrain.runtime.retries import undamaged


class FlakyFileSystem(MemoryFileSystem):
    """A store in memory whose reads fail or hang as often as `troubles` says."""

    protocol = ("flaky",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    troubles: ClassVar[Iterator[Any]] = iter(())

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        trouble = next(self.troubles, None)
        if trouble == "hang":
            threading.Event().wait(20)
        elif trouble is not None:
            raise trouble
        data: bytes = super().cat_file(path, start, end, **options)
        return data


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture(params=["file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "data") if request.param == "file" else f"memory://{tmp_path.name}"


def test_write_read_list_remove(folder: str) -> None:
    url = storage.join(folder, "sub", "x.bin")
    assert not storage.exists(url) and storage.find(folder) == {} and storage.list_names(folder) == []
    storage.write_bytes(url, b"first")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_bytes(url, 2, 5) == b"234"
    assert storage.size(url) == 10
    storage.write_bytes(storage.join(folder, "y.txt"), b"y")
    assert storage.find(folder) == {"sub/x.bin": 10, "y.txt": 1}
    assert storage.list_names(folder) == ["sub", "y.txt"]
    assert [
        found.endswith("data/sub/x.bin") or "sub/x.bin" in found for found in storage.glob(folder + "/*/*.bin")
    ] == [True]
    storage.move(storage.join(folder, "sub"), storage.join(folder, "published"))
    assert storage.find(folder) == {"published/x.bin": 10, "y.txt": 1}
    storage.remove(storage.join(folder, "published"))
    storage.remove(storage.join(folder, "published"))
    assert storage.find(folder) == {"y.txt": 1}


def test_upload_and_download(folder: str, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(b"abc" * 1000)
    url = storage.join(folder, "deep", "copy")
    storage.upload(str(tmp_path / "local"), url)
    storage.download(url, str(tmp_path / "back"), 3000)
    assert (tmp_path / "back").read_bytes() == b"abc" * 1000
    with pytest.raises(StorageError, match="3000 bytes, its index says 3001"):
        storage.download(url, str(tmp_path / "back"), 3001)


def test_a_range_beyond_the_end_is_an_error(folder: str) -> None:
    url = storage.join(folder, "short")
    storage.write_bytes(url, b"12345")
    with pytest.raises(StorageError, match="2 bytes from 3 on instead of 7"):
        storage.read_bytes(url, 3, 10)


def test_transient_errors_are_tried_again() -> None:
    storage.write_bytes("flaky://box/x", b"data")
    FlakyFileSystem.troubles = iter([ConnectionError("reset"), TimeoutError("slow")])
    assert storage.read_bytes("flaky://box/x", deadline_s=30) == b"data"
    assert next(FlakyFileSystem.troubles, "used up") == "used up"


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no"), TypeError("a bug")])
def test_permanent_errors_come_at_once(error: Exception) -> None:
    FlakyFileSystem.troubles = itertools.repeat(error)
    begin = time.monotonic()
    with pytest.raises(StorageError, match=type(error).__name__):
        storage.read_bytes("flaky://box/x", deadline_s=30)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("trouble", ["hang", ConnectionError("down")])
def test_the_deadline_holds(trouble: Any) -> None:
    FlakyFileSystem.troubles = itertools.repeat(trouble)
    begin = time.monotonic()
    with pytest.raises(StorageError, match="flaky://box/x"):
        storage.read_bytes("flaky://box/x", deadline_s=1.0)
    assert time.monotonic() - begin < 3


def test_missing_clients_name_the_extra() -> None:
    with pytest.raises(StorageError, match="Protocol not known"):
        storage.read_bytes("nonsense://x")
    clients = {"gs": ("gcsfs", "gcs"), "abfs": ("adlfs", "azure"), "s3": ("s3fs", "s3")}
    missing = [(url, extra) for url, (package, extra) in clients.items() if not importlib.util.find_spec(package)]
    if not missing:
        pytest.skip("every object-store client is installed")
    for protocol, extra in missing:
        with pytest.raises(StorageError, match=rf"pip install 'tubelet\[{extra}\]'"):
            storage.read_bytes(f"{protocol}://bucket/x")


def test_linked_folders_and_files_are_found_and_loops_are_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "classes"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "a.mp4").write_bytes(b"12345")
    (elsewhere / "deep" / "b.mp4").write_bytes(b"1")
    (root / "plain").mkdir(parents=True)
    (root / "plain" / "c.mp4").write_bytes(b"123")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)  # another class of the same films: both are meant
    (root / "plain" / "d.mp4").symlink_to(elsewhere / "a.mp4")
    (root / "plain" / "loop").symlink_to(root)
    (root / "plain" / "gone.mp4").symlink_to(tmp_path / "nowhere")
    found = storage.find_linked(str(root))
    assert found == {
        "again/a.mp4": 5, "again/deep/b.mp4": 1, "linked/a.mp4": 5, "linked/deep/b.mp4": 1, "plain/c.mp4": 3,
        "plain/d.mp4": 5, "plain/gone.mp4": 0,
    }  # fmt: skip
    assert "loop leads back" in caplog.text
    assert storage.find_linked(str(elsewhere)) == storage.find(str(elsewhere))
    assert storage.find_linked(f"file://{elsewhere}") == storage.find(str(elsewhere))


def test_a_file_that_is_gone_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "MISSING_S", 1.0)
    asked: list[float] = []

    def read(missing: float) -> bytes:
        asked.append(time.monotonic())
        if len(asked) <= missing:
            raise FileNotFoundError("404")
        return b"here"

    found = retries.retried(lambda: read(2), "s3://a/b", "reading", 30.0, denied_for_good=False)
    assert found == b"here" and len(asked) == 3
    asked.clear()
    with pytest.raises(StorageError, match="404"):
        retries.retried(lambda: read(math.inf), "s3://a/b", "reading", 30.0, denied_for_good=False)
    assert 1 < len(asked) and asked[-1] - asked[0] < 10, "what stays away is missing"
    asked.clear()
    with pytest.raises(StorageError, match="404"):
        retries.retried(lambda: read(math.inf), "s3://a/b", "reading", 30.0)
    assert len(asked) == 1, "where nothing was there before, at once"


@pytest.mark.parametrize(
    ("answers", "asked", "found"),
    [
        ([b"wrong 1", b"wrong 2", b"wrong 3", b"right"], 4, b"right"),
        ([b"wrong 1", b"wrong 2", b"wrong 2", b"right"], 3, b"wrong 2"),
        ([b"", b"right"], 1, b""),
    ],
)
def test_bytes_are_believed_when_they_come_alike_twice(answers: list[bytes], asked: int, found: bytes) -> None:
    """Each bit that flips on the way is another; two in a row must not blame the file."""
    given = iter(answers)
    assert undamaged(lambda: next(given), lambda data: data == b"right") == found
    assert len(list(given)) == len(answers) - asked
