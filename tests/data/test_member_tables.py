"""Member tables belong to the index that names them: others are refused by name; early indexes go on working."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pretrain.commands.pack import main
from pretrain.data.fetch import RawSample, SampleReader
from pretrain.data.index import load_index
from pretrain.errors import DataError
from pretrain.runtime import storage
from tests.toy_shards import forget_hashes, swap_rows, write_shard

TABLE = "clips-000000.members.json"


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of four samples, indexed in place."""
    folder = tmp_path_factory.mktemp("indexed")
    for shard in range(2):
        samples = [(f"{shard}-{row}", {"label": row}, bytes([row]) * (300 + 700 * row)) for row in range(4)]
        write_shard(folder / f"clips-{shard:06d}.tar", samples)
    assert main(["--index-only", str(folder)]) == 0
    return folder


@pytest.fixture
def data(indexed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(indexed, tmp_path / "data")


def first(url: str) -> RawSample:
    return SampleReader([load_index(url)], None, 5.0).read(0, 0, 0)


def change_key(table: Path) -> None:
    table.write_text(table.read_text().replace('"0-0"', '"0-7"'))


def cut(table: Path) -> None:
    table.write_bytes(table.read_bytes()[:-9])


def take_another(table: Path) -> None:
    shutil.copy(table.with_name("clips-000001.members.json"), table)


@pytest.mark.parametrize("harm", [swap_rows, change_key, cut, take_another])
@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_table_that_is_not_the_indexed_one_is_named(
    harm: Callable[[Path], None], scheme: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, fingerprint = first(str(data)), load_index(str(data)).fingerprint
    assert sound.key == "0-0"
    harm(data / TABLE)
    url = str(data)
    if scheme:
        url = f"{scheme}tables{data}"
        fsspec.filesystem("memory").put(f"{data}/", url.removeprefix(scheme) + "/", recursive=True)
    with pytest.raises(DataError) as error:
        first(url)
    said = str(error.value)
    assert said.startswith(f"{storage.join(url, TABLE)}: this member table is not the one that was indexed")
    assert f"--index-only {url}" in said
    assert main(["--check", url, "--workers", "0", "--hashes-only"]) == 1
    assert "is not the one that was indexed" in capsys.readouterr().err
    assert main(["--index-only", url]) == 0
    assert first(url).data == sound.data and load_index(url).fingerprint == fingerprint


def test_the_fingerprint_covers_the_tables(data: Path) -> None:
    before = load_index(str(data))
    swap_rows(data / TABLE)
    content = json.loads((data / "index.json").read_text())
    content["shards"][0]["members"] = hashlib.sha256((data / TABLE).read_bytes()).hexdigest()
    (data / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not match its entries"):
        load_index(str(data))
    assert before.fingerprint != before.fingerprint_of_shards


def test_an_index_of_an_early_release_goes_on_working(
    data: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    hashed = load_index(str(data))
    forget_hashes(data)
    early = load_index(str(data))
    assert early.fingerprint == hashed.fingerprint_of_shards and first(str(data)).key == "0-0"
    assert main(["--check", str(data), "--workers", "0", "--hashes-only"]) == 0
    assert caplog.text.count(f"launch/pack.py --index-only {data} adds them") == 1
    assert main(["--index-only", str(data)]) == 0
    assert load_index(str(data)) == hashed
    # Half of a data set may have been packed by an early release: its runs go on when the other half is hashed.
    content = json.loads((data / "index.json").read_text())
    del content["shards"][1]["members"]
    (data / "index.json").write_text(json.dumps(content | {"fingerprint": early.fingerprint}))
    assert load_index(str(data)).fingerprint == early.fingerprint
    swap_rows(data / TABLE)
    with pytest.raises(DataError, match="not the one that was indexed"):
        first(str(data))


def test_a_damaged_sample_of_an_early_index_may_be_a_changed_table(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads((data / TABLE).read_text())
    table["offsets"][0] += 512
    (data / TABLE).write_text(json.dumps(table))
    forget_hashes(data)
    with pytest.raises(DataError, match=f"has other bytes than .*, or {TABLE} was changed"):
        first(str(data))
    assert main(["--check", str(data), "--workers", "0", "--hashes-only"]) == 1
    assert "clips-000000.tar: its member table does not match the tar" in capsys.readouterr().err


def test_a_bit_that_flips_on_the_way_is_read_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer alone is damaged, as by a network card: no storage can be told to do that."""
    sound, reads, plain = first(str(data)), [], storage.read_bytes

    def read(url: str, *arguments: object, **options: object) -> bytes:
        reads.append(url)
        content: bytes = plain(url, *arguments, **options)  # type: ignore[arg-type]
        return content.replace(b"keys", b"kexs") if reads.count(url) == 1 else content

    monkeypatch.setattr(storage, "read_bytes", read)
    reader = SampleReader([load_index(str(data))], None, 5.0)
    assert reader.read(0, 0, 0) == sound and reads.count(str(data / TABLE)) == 2
    assert reader.read(0, 0, 1).key == "0-1" and reads.count(str(data / TABLE)) == 2, "once a table"
