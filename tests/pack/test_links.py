"""Videos in place: shards of links, read like packed ones."""

import json
from pathlib import Path

import pytest
import webdataset as wds

from pretrain.commands.pack import main
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index, load_members
from pretrain.data.members import parse_sample
from pretrain.errors import SampleError


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """An official list of three files, of which the content does not matter here."""
    for name in ("a.mp4", "b.webm", "c.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(name.encode() * 1000)
    (tmp_path / "train.csv").write_text("videos/a.mp4 3\nvideos/b.webm 0\nvideos/c.mp4 7\n")
    assert main(["--in-place", str(tmp_path / "train.csv"), str(tmp_path / "out")]) == 0
    return tmp_path


def test_samples_are_those_of_packed_shards(listed: Path) -> None:
    index = load_index(str(listed / "out"))
    reader, found = SampleReader([index], None, 10), {}
    for row in range(index.samples):
        members = parse_sample(reader.read(0, 0, row))
        found[members.video()] = members.label
    assert found == {b"a.mp4" * 1000: 3, b"b.webm" * 1000: 0, b"c.mp4" * 1000: 7}
    assert sum(shard.bytes for shard in index.shards) < 3 * 10240, "no video was copied"


def test_webdataset_reads_links(listed: Path) -> None:
    paths = [str(path) for path in (listed / "out").glob("*.tar")]
    samples = list(wds.WebDataset(paths, shardshuffle=False))
    where = {json.loads(sample["json"])["label"]: sample["link"].decode() for sample in samples}
    assert where[0] == str(listed / "videos" / "b.webm")


def test_a_file_that_is_gone_is_a_bad_sample(listed: Path) -> None:
    (listed / "videos" / "b.webm").unlink()
    index = load_index(str(listed / "out"))
    reader, reasons = SampleReader([index], None, 0.5), []
    for row in range(3):
        try:
            reader.read(0, 0, row)
        except SampleError as error:
            reasons.append((error.reason, "b.webm" in str(error)))
    assert reasons == [("missing", True)]


def test_what_can_not_stay_in_place(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(listed / "out")
    assert main(["--in-place", str(listed / "train.csv"), out]) == 1
    assert "holds an index already" in capsys.readouterr().err
    (listed / "frames").mkdir()
    (listed / "frames" / "img_00001.jpg").write_bytes(b"x")
    (listed / "other.csv").write_text("videos/gone.mp4 1\n")
    assert main(["--in-place", str(listed / "frames"), str(listed / "other.csv"), str(listed / "more")]) == 2
    said = capsys.readouterr().err
    assert "gone.mp4: not found" in said and not (listed / "more").exists()


def test_indexing_again_gives_the_same(listed: Path) -> None:
    out = str(listed / "out")
    before = load_index(out)
    assert main(["--index-only", out]) == 0
    assert load_index(out) == before and load_members(out, before.shards[0]).linked
