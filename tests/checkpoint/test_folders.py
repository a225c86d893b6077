from pathlib import Path

import pytest

from pretrain.checkpoint import folders


def make(root: Path, *steps: int) -> None:
    for step in steps:
        folder = folders.folder_of(root, step)
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"w")


def steps(root: Path) -> list[int]:
    return [folders.step_of(folder) for folder in folders.published(root)]


@pytest.mark.parametrize(
    ("present", "keep_last", "every", "expected"),
    [
        ([5, 10, 15, 20], 2, None, {15, 20}),
        ([5, 10, 15, 20], 1, 10, {10, 20}),
        ([4, 8, 12, 16, 20, 24], 1, 10, {12, 20, 24}),
        ([7], 3, None, {7}),
        ([7], 0, None, {7}),
        ([], 2, 10, set()),
    ],
)
def test_what_is_retained(present: list[int], keep_last: int, every: int | None, expected: set[int]) -> None:
    assert folders.retained(present, keep_last, every) == expected


def test_retaining_step_by_step_keeps_one_of_each_stretch(tmp_path: Path) -> None:
    for step in range(3, 61, 3):
        make(tmp_path, step)
        folders.apply_retention(tmp_path, keep_last=2, keep_every_steps=10)
    assert steps(tmp_path) == [12, 21, 30, 42, 51, 57, 60]


def test_a_file_named_keep_keeps_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    (folders.folder_of(tmp_path, 2) / folders.KEEP_FILE).touch()
    assert folders.apply_retention(tmp_path, keep_last=1, keep_every_steps=None) == [1, 3]
    assert steps(tmp_path) == [2, 4]


def test_leftovers_go_and_checkpoints_stay(tmp_path: Path) -> None:
    make(tmp_path, 100_000_000, 7)
    for name in (".saving_step_00000009", ".removing_step_00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    assert sorted(folders.clean_leftovers(tmp_path)) == [".removing_step_00000003", ".saving_step_00000009"]
    assert steps(tmp_path) == [7, 100_000_000]
    assert (tmp_path / "notes").is_dir()


def test_later_checkpoints_are_moved_aside_not_removed(tmp_path: Path) -> None:
    make(tmp_path, 4, 8, 12)
    folders.supersede_after(tmp_path, 4)
    assert steps(tmp_path) == [4]
    assert steps(tmp_path / "superseded") == [8, 12]


def test_publishing_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    make(tmp_path, 4)
    working = folders.working_folder_of(tmp_path, 4)
    working.mkdir()
    (working / "weights").write_bytes(b"new")
    assert folders.publish(tmp_path, 4).joinpath("weights").read_bytes() == b"new"
    assert not working.exists()
    assert steps(tmp_path) == [4]


def test_links_of_strangers_are_removed_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "checkpoints"
    (elsewhere / "step_00000001").mkdir(parents=True)
    root.mkdir()
    for name in (".saving_step_00000002", ".removing_step_00000001", "step_00000003"):
        (root / name).symlink_to(elsewhere)
    (root / ".saving_step_00000004").write_text("a file")
    (root / ".saving_step_00000005").symlink_to(tmp_path / "nowhere")
    assert len(folders.clean_leftovers(root)) == 4
    folders.remove(root / "step_00000003")
    assert list(root.iterdir()) == [] and [path.name for path in elsewhere.iterdir()] == ["step_00000001"]
