"""The hold of a run on its folder: noticed when somebody takes the folder or its lock away."""

import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from pretrain.errors import TrainingError
from pretrain.runtime import run_folder
from pretrain.runtime.metrics import JsonLines, read_records
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.run_folder import LOCK, Hold, open_folder

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def hold(tmp_path: Path) -> Hold:
    return open_folder(str(tmp_path / "run"), ALONE)[1]


def locked(root: Path) -> bool:
    """Whether another process would be refused."""
    lock = FileLock(root / LOCK)
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return True
    lock.release()
    return False


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced", "lock deleted", "lock replaced"])
def test_what_was_taken_away_is_taken_again(
    hold: Hold, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
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
        (root / LOCK).unlink()
    if how == "lock replaced":
        (root / LOCK).touch()
    assert hold.renew() and locked(root) and not hold.renew()
    told = {"deleted": "was deleted", "renamed": "elsewhere", "replaced": "elsewhere"}.get(how, "its lock was deleted")
    assert told in caplog.text
    hold.release()
    assert not locked(root)


def test_a_folder_that_another_run_has_taken_ends_this_one(hold: Hold, tmp_path: Path) -> None:
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    _, other = open_folder(str(tmp_path / "run"), ALONE)
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
        open_folder(str(tmp_path), ALONE)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match=f"{name}: no folder"):
        open_folder(str(tmp_path), ALONE)
