"""Checkpoints on a real S3 server: uploaded whole, retired, found again, and never half."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import MANIFEST, Manifest, describe_file, problems, write_manifest
from pretrain.checkpoint.rank_messages import RankMessages
from pretrain.checkpoint.remote import RemoteCheckpoints
from pretrain.checkpoint.restore import local_copy, prepare_resume
from pretrain.checkpoint.resume import find_checkpoint
from pretrain.checkpoint.upload import Uploader
from pretrain.errors import CheckpointError
from pretrain.recipe.schema import Checkpoint
from pretrain.runtime.process_group import Ranks

URL = "s3://bucket/runs/one"
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def publish(root: Path, step: int, size: int = 1000) -> Path:
    """A local checkpoint with three files."""
    folder = folders.folder_of(root, step)
    (folder / "deepspeed").mkdir(parents=True)
    names = ["state.json", "deepspeed/a.pt", "deepspeed/b.pt"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(b'{"step": %d}' % step if number == 0 else bytes([step, number]) * size)
    write_manifest(folder, Manifest(step, tuple(describe_file(folder, name) for name in names)))
    return folder


@pytest.fixture
def remote(s3_server: Any) -> RemoteCheckpoints:
    return RemoteCheckpoints(URL, deadline_s=30.0)


@pytest.fixture
def uploader(tmp_path: Path) -> Iterator[Callable[..., Uploader]]:
    """Opens uploaders of tmp_path/run/checkpoints, each a rank of one run, and ends them."""
    store, channels = dist.HashStore(), []

    def open_one(remote: RemoteCheckpoints, rank: int = 0, world_size: int = 1, space: str = "x") -> Uploader:
        channels.append(RankMessages(space, store))
        ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
        return Uploader(tmp_path / "run" / "checkpoints", remote, ranks, channels[-1], 2, 10)

    yield open_one
    for channel in channels:
        channel.closed = True


def objects(server: Any, step: int) -> list[str]:
    folder = server.bucket / "runs/one/checkpoints" / f"step_{step:08d}"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_two_ranks_upload_and_retire(tmp_path: Path, s3_server: Any, remote: RemoteCheckpoints, uploader: Any) -> None:
    root = tmp_path / "run" / "checkpoints"
    publish(root, 6)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 6}\n')
    bad_samples = [f"rank_{rank:05d}.jsonl" for rank in range(3)]  # the third of an earlier start with more ranks
    (tmp_path / "run" / "bad_samples").mkdir()
    for name in bad_samples:
        (tmp_path / "run" / "bad_samples" / name).write_text(name)
    both = [uploader(remote, rank, 2) for rank in (0, 1)]
    for step in (9, 12, 15, 18):
        publish(root, step)
        for one in both:
            one.offer(step)
    other = threading.Thread(target=both[1].finish)
    other.start()
    assert both[0].finish() == ""
    other.join(timeout=30)
    assert not other.is_alive()
    assert remote.steps() == [12, 15, 18], "the newest two, and the first after 10 for good"
    assert objects(s3_server, 18) == ["deepspeed/a.pt", "deepspeed/b.pt", "manifest.json", "state.json"]
    assert objects(s3_server, 9) == []
    assert (s3_server.bucket / "runs/one/metrics.jsonl").is_file()
    assert sorted(path.name for path in (s3_server.bucket / "runs/one/bad_samples").iterdir()) == bad_samples


def test_an_upload_that_was_killed_is_no_checkpoint_and_is_made_good(
    tmp_path: Path, s3_server: Any, remote: RemoteCheckpoints, uploader: Any
) -> None:
    root = tmp_path / "run" / "checkpoints"
    files = publish(root, 3)
    half = s3_server.bucket / "runs/one/checkpoints/step_00000003"
    half.mkdir(parents=True)
    (half / "state.json").write_bytes((files / "state.json").read_bytes())
    assert remote.steps() == []
    assert uploader(remote).finish() == ""
    assert remote.steps() == [3]


def test_an_outage_is_told_and_made_good_when_the_next_one_is_due(
    tmp_path: Path, s3_server: Any, uploader: Any, caplog: pytest.LogCaptureFixture
) -> None:
    impatient = RemoteCheckpoints(URL, deadline_s=2.0)
    root = tmp_path / "run" / "checkpoints"
    s3_server.stop()
    publish(root, 3)
    one = uploader(impatient)
    told = threading.Event()
    one._tell = lambda *words, tell=one._tell: (tell(*words), told.set())
    assert told.wait(60)
    assert "step 3 NOT UPLOADED" in caplog.text and "kept on the local disk" in caplog.text
    assert '"3":' in (tmp_path / "run" / "uploads.json").read_text()
    s3_server.start()
    impatient.deadline_s = impatient._request_s = 30.0
    publish(root, 6)
    one.offer(6)
    assert one.finish() == ""
    assert impatient.steps() == [3, 6]


def test_what_never_arrives_is_told_at_the_end(tmp_path: Path, s3_server: Any, uploader: Any) -> None:
    s3_server.stop()
    publish(tmp_path / "run" / "checkpoints", 3)
    problem = uploader(RemoteCheckpoints(URL, deadline_s=1.0)).finish()
    assert "step_00000003 could not be uploaded" in problem and "start the same command again" in problem


def test_a_lost_disk_is_restored_from_the_newest_that_verifies(
    tmp_path: Path, s3_server: Any, remote: RemoteCheckpoints, uploader: Any, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (3, 6):
        publish(root, step)
    records = ["metrics.jsonl", "guard.json", "hangs.jsonl", "timings.json", "bad_samples/rank_00007.jsonl"]
    for name in records:
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(f"history of {name}\n")
    assert uploader(remote).finish() == ""
    shutil.rmtree(tmp_path / "run")
    damaged = s3_server.bucket / "runs/one/checkpoints/step_00000006/deepspeed/b.pt"
    data = bytearray(damaged.read_bytes())
    data[7] ^= 1
    damaged.write_bytes(data)  # of the right size: only the hash tells
    options = Checkpoint(upload=URL, upload_deadline_s=30.0)
    assert prepare_resume(root, options, ALONE, "auto") == "auto"
    found = find_checkpoint(root, ALONE)
    assert found is not None and found.step == 3 and problems(found.folder) == []
    assert "step_00000006 can't be restored" in caplog.text and "sha256" in caplog.text
    assert {name: (tmp_path / "run" / name).read_text() for name in records} == {
        name: f"history of {name}\n" for name in records
    }
    assert [path.name for path in root.iterdir()] == ["step_00000003"]


def test_a_newer_local_checkpoint_is_not_replaced(
    tmp_path: Path, s3_server: Any, remote: RemoteCheckpoints, uploader: Any
) -> None:
    root = tmp_path / "run" / "checkpoints"
    publish(root, 3)
    assert uploader(remote).finish() == ""
    newer = publish(root, 6)
    before = (newer / MANIFEST).stat().st_mtime_ns
    prepare_resume(root, Checkpoint(upload=URL, upload_deadline_s=30.0), ALONE, "auto")
    assert [folder.name for folder in folders.published(root)] == ["step_00000003", "step_00000006"]
    assert (newer / MANIFEST).stat().st_mtime_ns == before


def test_going_back_hides_later_checkpoints_in_the_store(
    tmp_path: Path, s3_server: Any, remote: RemoteCheckpoints, uploader: Any
) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (3, 6):
        publish(root, step)
    assert uploader(remote).finish() == ""
    chosen = prepare_resume(tmp_path / "other" / "checkpoints", Checkpoint(), ALONE, f"{URL}/checkpoints/step_00000003")
    assert problems(Path(chosen)) == []
    remote.supersede_after(3)
    assert remote.steps() == [3]
    shutil.rmtree(folders.folder_of(root, 6))
    publish(root, 6, size=500)  # the run comes there again, with other content
    assert uploader(remote, space="next start").finish() == ""
    assert remote.steps() == [3, 6] and remote.manifest(6).files[1].bytes == 1000


def test_never_and_unreachable_stores_are_refused(tmp_path: Path, s3_server: Any, uploader: Any) -> None:
    root, options = tmp_path / "run" / "checkpoints", Checkpoint(upload=URL, upload_deadline_s=2.0)
    publish(root, 3)
    assert uploader(RemoteCheckpoints(URL, 30.0)).finish() == ""
    with pytest.raises(CheckpointError, match=r"--resume never: s3://bucket/runs/one holds .*\[3\]"):
        prepare_resume(root, options, ALONE, "never")
    s3_server.stop()
    prepare_resume(root, options, ALONE, "auto")  # there is a local one
    shutil.rmtree(root)
    with pytest.raises(CheckpointError, match="can't be listed.*checkpoint.upload=null"):
        prepare_resume(root, options, ALONE, "auto")


def test_readers_of_weights_get_a_local_copy(
    tmp_path: Path, s3_server: Any, remote: RemoteCheckpoints, uploader: Any
) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (3, 6):
        publish(root, step)
    assert uploader(remote).finish() == ""
    newest = local_copy(URL, tmp_path / "cache")
    assert newest.name == "step_00000006" and problems(newest) == []
    (newest / "deepspeed/a.pt").write_bytes(b"cut")
    assert problems(local_copy(URL + "/", tmp_path / "cache")) == []
    assert local_copy(f"{URL}/checkpoints/step_00000003", tmp_path / "cache").name == "step_00000003"
    assert str(local_copy("s3://bucket/other.pth", tmp_path / "cache")).endswith("other.pth")
    assert local_copy(tmp_path) == tmp_path


def test_the_best_checkpoint_stays_in_the_store(
    tmp_path: Path, s3_server: Any, remote: RemoteCheckpoints, uploader: Any
) -> None:
    root = tmp_path / "run" / "checkpoints"
    one = uploader(remote)
    for step in (1, 2, 3, 4):
        publish(root, step)
        one.offer(step, {2})
    assert one.finish() == ""
    assert remote.steps() == [2, 3, 4]


@pytest.mark.parametrize("url", [URL, URL + "/checkpoints", URL + "/checkpoints/up", "s3://bucket/runs", "s3://bucket"])
def test_a_store_that_is_the_run_folder_by_another_way_is_refused(s3_server: Any, url: str) -> None:
    run = s3_server.bucket / "runs" / "one"  # as of a bucket that is mounted
    publish(run / "checkpoints", 3)
    before = {*run.rglob("*")}
    with pytest.raises(CheckpointError, match="is, holds or lies in the run folder"):
        prepare_resume(run / "checkpoints", Checkpoint(upload=url, upload_deadline_s=30.0), ALONE, "auto")
    assert {*run.rglob("*")} - {run / ".run_id"} == before and problems(folders.folder_of(run / "checkpoints", 3)) == []
