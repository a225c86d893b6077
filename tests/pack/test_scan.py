"""Indexing shards that others wrote."""

import io
import tarfile
import zlib
from pathlib import Path

import pytest

from pretrain.data.index import load_members
from pretrain.data.pack.scan import index_folder
from pretrain.errors import DataError


def _tar(path: Path, names: list[str], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = 700 * number
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_grouping(tar_format: int, tmp_path: Path) -> None:
    long = "d/" + "x" * 90
    names = ["a.mp4", "a.cls", "b.txt", "b.video.webm", "text.txt", f"{long}.MKV", f"{long}.json", "notes"]
    path = _tar(tmp_path / "deep/x.tar", names, tar_format)
    index, notes = index_folder(str(tmp_path))
    assert [shard.name for shard in index.shards] == ["deep/x.tar"]
    members = load_members(str(tmp_path), index.shards[0])
    assert list(members.keys) == ["a", "b", long]
    assert "1 of 4" in notes[0]
    assert members.checksums is not None
    table = zip(members.keys, members.offsets, members.sizes, members.checksums, strict=True)
    for key, offset, size, checksum in table:
        piece = path.read_bytes()[offset : offset + size]
        assert zlib.crc32(piece) == checksum
        with tarfile.open(fileobj=io.BytesIO(piece)) as tar:
            assert tar.getnames() == [name for name in names if name.startswith(key + ".")]


def test_all_unusable_shards_are_reported(tmp_path: Path) -> None:
    good = _tar(tmp_path / "a.tar", ["a.mp4", "b.mp4"]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(good[:900])
    (tmp_path / "text.tar").write_text("no tar file at all" * 100)
    _tar(tmp_path / "split.tar", ["a.mp4", "b.mp4", "a.json"])
    with pytest.raises(DataError) as error:
        index_folder(str(tmp_path))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for name, line in zip(("cut.tar", "split.tar", "text.tar"), lines, strict=True):
        assert name in line
    assert not (tmp_path / "index.json").exists()


def test_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no .tar files"):
        index_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.mp4", *["b.mp4"] * 9, "b.json"], "file 'b.mp4' occurs 9 times: a sample has one file of each ending"),
        (["a.MP4", "a.mp4"], "file 'a.mp4' occurs 2 times"),
        (["a.cls", "a.mp4", "a.cls"], "file 'a.cls' occurs 2 times"),
        (["b.mp4", "b.mp4", "c.mp4", "c.mp4", "c.mp4"], r"file 'b.mp4' occurs 2 times \(1 more the like\)"),
        ([name for number in range(9) for name in ("b.mp4", f"c{number}.mp4")], "key 'b' occurs 9 times: the files"),
        (["caf\udce9.mp4", "b.mp4", "caf\udce9.mp4"], r"key 'caf\\udce9' occurs 2 times"),
    ],
)
def test_a_key_of_several_samples_is_refused_with_its_count(names: list[str], said: str, tmp_path: Path) -> None:
    _tar(tmp_path / "x.tar", names)
    with pytest.raises(DataError, match=f"x.tar: {said}"):
        index_folder(str(tmp_path))


def test_several_videos_of_one_key_are_told(tmp_path: Path) -> None:
    """A name's first dot ends its key: nine parts of a film are one sample to webdataset."""
    _tar(tmp_path / "a.tar", [f"film.{number:03d}.mp4" for number in range(9)] + ["b.mp4", "b.json"])
    _tar(tmp_path / "b.tar", ["a.mp4", "a.flow.mp4", "a.cls", "b.rgb.mp4", "b.txt"])
    index, (note,) = index_folder(str(tmp_path))
    assert [shard.samples for shard in index.shards] == [2, 2]
    assert "a.tar: 1 of 2 samples hold several videos, 'film' 9 of them ('000.mp4', '001.mp4' ...)" in note
