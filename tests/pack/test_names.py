"""Names that are not in UTF-8, as disks and archives from Windows and old systems have them."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from pretrain.commands.pack import main
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.samples import parse_sample
from tests.films import write_film

#: As Python names what Latin-1 calls café and cafè: one key, if the bytes are dropped.
NAMES = ("caf\udce9", "caf\udce8")


def samples(url: Path) -> dict[str, str]:
    """Source by key."""
    index = load_index(str(url))
    reader = SampleReader([index], None, 5.0)
    places = [(shard, row) for shard, one in enumerate(index.shards) for row in range(one.samples)]
    found = [parse_sample(reader.read(0, *place)) for place in places]
    return {one.key: one.facts["source"] for one in found}


@pytest.mark.parametrize("dest", ["out", "caf\udce9/out"])
def test_files_of_any_name_are_packed(dest: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate((*NAMES, "run")):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / f"{name}.txt").write_text(f"text {number}")
    words = ["--kind", "text", "--no-labels", "--workers", "0", str(tmp_path / "texts"), str(tmp_path / dest)]
    assert main(words) == 0
    sources = samples(tmp_path / dest)
    assert len(sources) == 3 and set(sources.values()) == {f"{name}/{name}.txt" for name in (*NAMES, "run")}
    assert all(key.isascii() for key in sources)
    assert main(["--check", str(tmp_path / dest), "--workers", "0"]) == 0
    parts = [str(tmp_path / f"{dest} in parts")] * 2
    for part in range(2):
        assert main(["--part", f"{part}/2", *words[:-1], parts[part]]) == 0
    assert samples(Path(parts[0])).keys() == sources.keys()
    (tmp_path / "texts" / NAMES[0] / f"{NAMES[0]}.txt").write_bytes(b"\xff")
    capfd.readouterr()
    assert main([*words[:-1], str(tmp_path / "again"), "--verbose"]) == 0
    (line,) = (tmp_path / "again" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith(f"{NAMES[0]}.txt")


def test_films_of_any_name_are_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    write_film(tmp_path / "film.mp4", frames=30)
    for name in NAMES:
        shutil.copy(tmp_path / "film.mp4", tmp_path / "films" / f"{name}.mp4")
    assert main(["--in-place", str(tmp_path / "films"), str(tmp_path / "out")]) == 0
    assert set(samples(tmp_path / "out").values()) == {f"{name}.mp4" for name in NAMES}
    check = ["--check", str(tmp_path / "out"), "--workers", "0", "--check-decoders", "pyav"]
    assert main(check) == 0
    (tmp_path / "films" / f"{NAMES[1]}.mp4").unlink()
    assert main(check) == 1


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_any_names_are_indexed(tar_format: int, tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", frames=12)
    (tmp_path / "out").mkdir()
    film = (tmp_path / "film.mp4").read_bytes()
    with tarfile.open(tmp_path / "out" / f"{NAMES[0]}.tar", "w", format=tar_format, errors="surrogateescape") as tar:
        for name in NAMES:
            for ending, data in (("json", b'{"source": "x"}'), ("mp4", film)):
                info = tarfile.TarInfo(f"d/{name}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert main(["--index-only", str(tmp_path / "out")]) == 0
    assert list(samples(tmp_path / "out")) == [f"d/{name}" for name in NAMES]
    assert main(["--check", str(tmp_path / "out"), "--workers", "0", "--check-decoders", "pyav"]) == 0


def test_class_folders_must_be_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A class's name is written to files and printed for as long as the model lives."""
    for name in (*NAMES, "run"):
        (tmp_path / "films" / name).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "films" / name / f"{number}.mp4").write_bytes(b"film")
    words = ["--in-place", str(tmp_path / "films"), str(tmp_path / "out")]
    assert main(words) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert "its label 'caf\\udce8' is not in UTF-8; rename the folder (convmv" in first and "udce9" in second
    assert not (tmp_path / "out").exists()
    assert main([*words, "--no-labels"]) == 0 and len(samples(tmp_path / "out")) == 6
    (tmp_path / "list.jsonl").write_text('{"path": "films/run/0.mp4", "label": "caf\\udce9"}')
    assert main(["--in-place", str(tmp_path / "list.jsonl"), str(tmp_path / "more")]) == 2


@pytest.mark.parametrize("ending", ["csv", "txt", "jsonl"])
def test_a_list_that_is_not_in_utf_8_is_told_with_its_line(
    ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"list.{ending}").write_bytes(b"path,label\nfilms/b.mp4,1\nfilms/caf\xe9.mp4,1\n")
    assert main(["--in-place", str(tmp_path / f"list.{ending}"), str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert f"list.{ending}:3: not text in UTF-8" in said and "iconv -f latin1 -t utf-8" in said
