"""Whole packings: restart, parts, order, storage, reports."""

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pretrain.data.cache import ShardCache
from pretrain.data.index import load_index, load_members
from pretrain.data.pack import shard_writer as shards
from pretrain.data.pack.discover import gather, with_sizes
from pretrain.data.pack.options import Options
from pretrain.data.pack.pack_plan import WHOLE, Part, make_plan
from pretrain.data.pack.pack_run import Report, pack
from pretrain.data.pack.pool import OrderedPool
from pretrain.data.pack.scan import index_folder
from pretrain.errors import DataError

OPTIONS = Options(tune="fastdecode", preset="ultrafast", decoders=("pyav",), reads=2, shard_samples=3)
ROOT = Path(__file__).resolve().parents[2]


def _run(
    videos: Path | str, dest: Path | str, part: Part = WHOLE, options: Options = OPTIONS, **more: object
) -> Report:
    plan = make_plan(with_sizes(gather([str(videos)])))
    return pack(plan, str(dest), options, part, **more)  # type: ignore[arg-type]


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Key -> (video, json) of every sample, read by upstream webdataset alone."""
    import webdataset  # not above: spawned workers import this file, and webdataset imports torch

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=False)
    return {sample["__key__"]: (sample["mp4"], sample["json"]) for sample in samples}


@pytest.fixture(scope="module")
def packed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All videos packed without interruption; read only."""
    dest = tmp_path_factory.mktemp("packed")
    report = _run(videos, dest)
    assert report.packed == 12 and report.index is not None and not report.rejected
    return dest


def test_samples(packed: Path) -> None:
    content = _content(packed)
    assert set(content) == {f"class{number % 3}/v{number}" for number in range(12)}
    for key, (video, text) in content.items():
        facts = json.loads(text)
        number = int(key.rsplit("v", 1)[1])
        assert facts["key"] == key and facts["label"] == f"class{number % 3}" and facts["frames"] == 10 + number
        assert facts["source"] == f"{key}.mp4" and len(facts["sha256"]) == 64 and video[4:8] == b"ftyp"


def test_members_point_at_whole_samples(packed: Path) -> None:
    index = load_index(str(packed))
    assert [shard.samples for shard in index.shards] == [3, 3, 3, 3]
    for shard in index.shards:
        data = (packed / shard.name).read_bytes()
        members = load_members(str(packed), shard)
        for key, offset, size in zip(members.keys, members.offsets, members.sizes, strict=True):
            with tarfile.open(fileobj=io.BytesIO(data[offset : offset + size]), mode="r:") as tar:
                assert tar.getnames() == [f"{key}.json", f"{key}.mp4"]


def test_shards_are_closed_by_size(videos: Path, tmp_path: Path) -> None:
    limit = 20_000
    report = _run(videos, tmp_path, options=Options(preset="ultrafast", decoders=(), shard_bytes=limit))
    assert report.index is not None and len(report.index.shards) > 2
    for shard in report.index.shards[:-1]:
        members = load_members(str(tmp_path), shard)
        assert members.offsets[-1] < limit <= members.offsets[-1] + members.sizes[-1]


def test_two_processes_write_the_same_bytes(videos: Path, packed: Path, tmp_path: Path) -> None:
    _run(videos, tmp_path, workers=2)
    assert _tree(tmp_path) == _tree(packed)


def test_kill_9_and_again_gives_the_same_bytes(videos: Path, packed: Path, tmp_path: Path) -> None:
    options = "--workers 1 --preset ultrafast --check-decoders pyav --check-reads 2 --shard-samples 3".split()
    command = [sys.executable, str(ROOT / "launch/pack.py"), str(videos), str(tmp_path / "dest"), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "dest/_pack/shard-000000.tar.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "dest/index.json").exists()
    first = os.stat(tmp_path / "dest/shard-000000.tar").st_mtime_ns
    (tmp_path / "dest/shard-000003.tar").write_bytes(b"half written")  # a shard without journal entry does not count
    report = _run(videos, tmp_path / "dest")
    assert report.resumed >= 3
    assert os.stat(tmp_path / "dest/shard-000000.tar").st_mtime_ns == first
    assert _tree(tmp_path / "dest") == _tree(packed)


def test_packing_again_changes_nothing(videos: Path, tmp_path: Path) -> None:
    _run(videos, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    report = _run(videos, tmp_path)
    assert report.packed == 12 and report.resumed == 12
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")} == before


def test_other_options_or_videos_are_refused_until_overwritten(videos: Path, tmp_path: Path) -> None:
    _run(videos / "class0", tmp_path)
    other = Options(preset="ultrafast", decoders=("pyav",), reads=2, shard_samples=3, gop=5)
    for source, options in ((videos / "class0", other), (videos / "class1", OPTIONS)):
        with pytest.raises(DataError, match="--overwrite"):
            _run(source, tmp_path, options=options)
    (tmp_path / "mine.txt").write_text("stays")
    _run(videos / "class1", tmp_path, overwrite=True)
    assert {key.split("/")[0] for key in _content(tmp_path)} <= {"v1", "v4", "v7", "v10"}
    assert (tmp_path / "mine.txt").read_text() == "stays"


def test_foreign_data_set_is_not_overwritten(videos: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes((packed / "index.json").read_bytes())
    with pytest.raises(DataError, match="another DEST"):
        _run(videos, tmp_path, overwrite=True)


def test_parts_merge_to_the_same_content(videos: Path, packed: Path, tmp_path: Path) -> None:
    one = _run(videos, tmp_path, Part(0, 2))
    assert one.index is None and not (tmp_path / "index.json").exists()
    with pytest.raises(DataError, match="1/2"):
        shards.merge(str(tmp_path), 2, require=True)
    two = _run(videos, tmp_path, Part(1, 2))
    assert two.index is not None and two.index.samples == 12 and one.packed + two.packed == 12
    assert 0 < one.packed < 12
    assert _content(tmp_path) == _content(packed)
    assert shards.count_parts(str(tmp_path)) == 2
    before = (tmp_path / "index.json").read_bytes()
    (tmp_path / "index.json").unlink()
    assert shards.merge(str(tmp_path), 2, require=True) is not None
    assert (tmp_path / "index.json").read_bytes() == before


def test_parts_of_other_videos_do_not_merge(videos: Path, tmp_path: Path) -> None:
    _run(videos / "class0", tmp_path, Part(0, 2))
    with pytest.raises(DataError, match="different videos"):
        _run(videos / "class1", tmp_path, Part(1, 2))


@pytest.mark.parametrize("count", [1, 2])
def test_duplicates_and_broken_files_are_listed(count: int, tmp_path: Path, make_video: Callable[..., Path]) -> None:
    good = make_video(tmp_path / "in/a.mp4").read_bytes()
    for name in ("b.mp4", "sub/c.mp4"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(good)
    (tmp_path / "in/text.mp4").write_text("no video")
    (tmp_path / "list.csv").write_text(
        "in/a.mp4 0\nin/b.mp4 1\nin/sub/c.mp4 2\nin/text.mp4 3\nin/gone.mp4 4\nin/a.mp4 5\n"
    )
    for index in range(count):
        report = _run(tmp_path / "list.csv", tmp_path / "dest", Part(index, count))
    assert report.index is not None and report.index.samples == 1
    lines = [json.loads(line) for line in (tmp_path / "dest/rejected.jsonl").read_text().splitlines()]
    reasons = sorted(line["reason"] for line in lines)
    assert reasons == ["duplicate", "duplicate", "missing", "repeated", "unreadable"]
    kept = next(iter(_content(tmp_path / "dest"))) + ".mp4"
    assert all(kept in line["detail"] for line in lines if line["reason"] == "duplicate")


def test_duplicates_are_known_after_a_restart(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    for number in range(4):
        make_video(tmp_path / f"in/{number}.mp4", seed=number % 2)
    options = Options(preset="ultrafast", decoders=(), shard_samples=1)
    whole = _run(tmp_path / "in", tmp_path / "whole", options=options)
    assert whole.packed == 2 and len(whole.rejected) == 2
    _run(tmp_path / "in", tmp_path / "again", options=options)
    for name in ("index.json", "_pack/part-0000of0001.json", "_pack/shard-000001.tar.json", "shard-000001.tar"):
        (tmp_path / "again" / name).unlink()
    _run(tmp_path / "in", tmp_path / "again", options=options)
    assert _tree(tmp_path / "again") == _tree(tmp_path / "whole")


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_text("no video")
    with pytest.raises(DataError, match="not one video"):
        _run(tmp_path / "in", tmp_path / "dest")
    assert "unreadable" in (tmp_path / "dest/rejected.jsonl").read_text()


def test_object_store(videos: Path, packed: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("class0/v0.mp4", "class1/v1.mp4"):
        fs.pipe_file(f"/source/{name}", (videos / name).read_bytes())
    report = _run("memory://source", "memory://dest/set")
    assert report.packed == 2
    index = load_index("memory://dest/set")
    data = fs.cat_file(f"/dest/set/{index.shards[0].name}")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.extractfile("class0/v0.mp4")
        assert member is not None and member.read() == _content(packed)["class0/v0"][0]


def test_index_of_foreign_shards_equals_our_own(packed: Path, tmp_path: Path) -> None:
    for path in packed.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index, notes = index_folder(str(tmp_path))
    assert not notes and index.shards == load_index(str(packed)).shards
    for path in packed.glob("*.json"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_second_process_on_the_same_part_is_refused(videos: Path, tmp_path: Path) -> None:
    from pretrain.data.pack.pack_run import _work_folder

    with _work_folder(str(tmp_path), WHOLE), pytest.raises(DataError, match="another process"):
        _run(videos, tmp_path)


def test_a_temporary_folder_without_flock_is_not_taken_for_another_process(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flock is made to fail, since the disks of a test machine have it."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DataError, match="can't be locked .*TMPDIR"):
        _run(videos, tmp_path)
    with pytest.raises(DataError, match="without flock.*local disk"):
        ShardCache(str(tmp_path / "cache"), 1000)


def _square_or_die(number: int) -> int:
    if number in (3, 7):
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def _dead(number: int) -> int:
    return -number


def test_a_worker_that_dies_costs_its_task_only() -> None:
    pool = OrderedPool(_square_or_die, _dead, workers=2)
    assert list(pool.map(range(10))) == [0, 1, 4, -3, 16, 25, 36, -7, 64, 81]
