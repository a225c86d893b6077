"""The hold of a run on its folder: noticed when somebody takes the folder or its lock away."""

import errno
import fcntl
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.errors import TrainingError
from pretrain.runtime import run_folder
from pretrain.runtime.heartbeats import Heartbeats
from pretrain.runtime.lease import PREFIX
from pretrain.runtime.metrics import JsonLines, read_records
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.run_folder import LOCK, Hold, open_folder

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(params=["flock", "no flock"])
def lock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the file that holds the folder, on file systems of both kinds."""
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0)
    if request.param == "flock":
        return LOCK
    refuse_flock(monkeypatch, errno.ENOLCK)
    return f"{PREFIX}000001"


def refuse_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Have flock fail: the disks of a test machine all have it."""

    def refuse(*_: object) -> None:
        raise OSError(code, "no flock here")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def hold(tmp_path: Path, lock: str) -> Hold:
    return open_folder(str(tmp_path / "run"), ALONE, beat_s=10)[1]


def locked(root: Path) -> bool:
    """Whether another start would be refused."""
    try:
        _, hold = open_folder(str(root), ALONE, beat_s=10)
    except TrainingError as error:
        assert "in use by" in str(error)
        return True
    hold.release()
    return False


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced", "lock deleted", "lock replaced"])
def test_what_was_taken_away_is_taken_again(
    hold: Hold, lock: str, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "run"
    assert not hold.renew() and locked(root)
    if how == "deleted":
        shutil.rmtree(root)
    elif how in ("renamed", "replaced"):
        root.rename(tmp_path / "elsewhere")
    if how == "replaced":
        root.mkdir()
    if how.startswith("lock"):
        (root / lock).unlink()
    if how == "lock replaced" and lock == LOCK:
        (root / lock).touch()
    for number in range(2):  # the first makes the folder again
        Heartbeats(root, "this start", 0, 1).beat(number)
    assert hold.renew() and locked(root) and not hold.renew()
    told = {"deleted": "was deleted", "renamed": "elsewhere", "replaced": "elsewhere"}.get(how, "its lock was deleted")
    assert told in caplog.text
    hold.release()
    assert not locked(root)


def test_a_folder_that_another_run_has_taken_ends_this_one(hold: Hold, tmp_path: Path) -> None:
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    _, other = open_folder(str(tmp_path / "run"), ALONE, beat_s=10)
    with pytest.raises(TrainingError, match="renamed to .*elsewhere, and another process has taken it since"):
        hold.renew()
    other.release()


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced"])
def test_lines_are_written_again_where_their_file_was_taken_away(tmp_path: Path, how: str) -> None:
    path = tmp_path / "m.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    lines.restore()
    if how == "deleted":
        path.unlink()
    else:
        path.rename(tmp_path / "elsewhere")
    if how == "replaced":
        path.write_text("somebody else's\n")
    lines.write({"step": 2})
    lines.restore()
    lines.write({"step": 3})
    lines.close()
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]
    assert (tmp_path / "m.jsonl.other").exists() == (how == "replaced")
    assert run_folder.identity(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", ["heartbeats", "checkpoints", "logs", "bad_samples"])
def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(TrainingError, match=f"{name}: no folder, and a run needs one there"):
        open_folder(str(tmp_path), ALONE, beat_s=10)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match=f"{name}: no folder"):
        open_folder(str(tmp_path), ALONE, beat_s=10)
