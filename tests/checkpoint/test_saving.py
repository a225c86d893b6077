"""Saving in the background: what is written is the state at the save, and a failed save loses nothing.

And reading what strangers have saved: nothing in any of the files is run, whoever reads it.
"""

import json
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import folders, save
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.checkpoint.manifest import describe_file, problems, read_manifest, write_manifest
from pretrain.checkpoint.rank_state import RankState, digests, load_rank_state
from pretrain.checkpoint.reshape import Layout
from pretrain.checkpoint.resume import find_checkpoint, load
from pretrain.checkpoint.save import Content, Saver, open_saver
from pretrain.checkpoint.snapshot import HostCopies
from pretrain.errors import CheckpointError
from pretrain.recipe.schema import Checkpoint
from pretrain.runtime.process_group import Ranks


def content(step: int) -> Content:
    return Content(step, {"step": step, "zero_stage": 1, "world_size": 1}, "run: {}\n")


def published(root: Path) -> list[int]:
    return [folders.step_of(folder) for folder in folders.published(root)]


@pytest.fixture
def open_one(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Opens savers, and closes them at the end."""
    monkeypatch.setattr(save, "AGAIN_S", 0.0)
    opened: list[Saver] = []

    def open_it(root: Path, **options: Any) -> Saver:
        opened.append(open_saver(root, ranks, Checkpoint(**options), None))
        return opened[-1]

    yield open_it
    for saver in opened:
        saver.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_written_is_the_state_at_the_save(
    engine: Any, open_one: Any, tmp_path: Path, asynchronous: bool
) -> None:
    saver = open_one(tmp_path, asynchronous=asynchronous)
    masters = engine.optimizer.single_partition_of_fp32_groups[0]
    engine.save_checkpoint(str(tmp_path / "plain"), tag="deepspeed")
    saver.save(engine, content(1))
    kept = masters.detach().clone()
    masters.data.add_(1.0)  # as the next step would, while the thread writes
    saver.finish()
    masters.data.copy_(kept)
    folder = folders.folder_of(tmp_path, 1)
    assert problems(folder) == []
    assert consolidated_state(folder).keys() == engine.module.state_dict().keys()
    for path in sorted((tmp_path / "plain" / "deepspeed").iterdir()):
        plain, ours = (torch.load(p, weights_only=False) for p in (path, folder / "deepspeed" / path.name))
        assert same(plain, ours), path.name
    for name in ("latest", "zero_to_fp32.py", "state.json", "recipe.yaml"):
        assert (folder / name).is_file()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_rank_state_is_in_the_manifest(engine: Any, open_one: Any, tmp_path: Path, asynchronous: bool) -> None:
    """As it was at the save, whatever the next step does."""
    saver = open_one(tmp_path, asynchronous=asynchronous)
    queue = RankState(torch.arange(6.0).view(2, 3), "same_on_all")
    saver.save(engine, replace(content(1), rank_state={"queue": queue}))
    queue.tensor.fill_(-1)
    saver.finish()
    folder = folders.folder_of(tmp_path, 1)
    assert problems(folder) == [] and "rank_state/rank_00000.pt" in {
        entry.path for entry in read_manifest(folder).files
    }
    load_rank_state(folder, {"queue": queue}, before=1, rank=0, world_size=1)
    assert queue.tensor.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_ranks_that_differ_make_no_checkpoint(
    engine: Any, open_one: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second rank's part of the save, written by hand: the engine lives alone in this process."""
    saver = open_one(tmp_path)
    same = digests({"queue": RankState(torch.zeros(2), "same_on_all")})
    saver._messages.post("save/1/1", json.dumps({"entries": [], "same": same}))
    saver.ranks = replace(saver.ranks, world_size=2)
    saver.save(engine, replace(content(1), rank_state={"queue": RankState(torch.ones(2), "same_on_all")}))
    saver.wait()
    assert "NO CHECKPOINT" in caplog.text and "queue is said to be same_on_all, but rank 1 of 2" in caplog.text
    assert published(tmp_path) == []


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal, tensors bit for bit and with their views of shared storages."""
    if isinstance(one, torch.Tensor):
        return bool(torch.equal(one, other)) and one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other)


def test_host_memory_is_used_again_and_views_stay_views() -> None:
    copies, flat = HostCopies(), torch.arange(100.0)
    state = {"a": flat[:40].view(4, 10), "b": flat[40:], "n": [1, ("x", flat)]}
    addresses = set()
    for _ in range(3):
        copies.begin()
        taken = copies.take(state)
        copies.end()
        flat.add_(1)
        assert torch.equal(taken["a"].flatten() + 1, flat[:40])
        assert taken["a"].untyped_storage().data_ptr() == taken["n"][1][1].untyped_storage().data_ptr()
        addresses.add(taken["b"].untyped_storage().data_ptr())
    assert len(addresses) == 1


def test_tensors_made_for_the_save_alone_are_not_taken_for_one_another() -> None:
    copies = HostCopies()
    copies.begin()
    # Each is gone when the next is made, which then lies where it lay.
    taken = [copies.take({"made": torch.full((100,), float(number))}) for number in range(20)]
    copies.end()
    assert [one["made"][0].item() for one in taken] == list(range(20))


def test_a_full_disk_costs_one_checkpoint_and_no_earlier_one(
    engine: Any, open_one: Any, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = open_one(small_disk, keep_last=3)
    saver.save(engine, content(1))
    saver.wait()
    (small_disk / "ballast").write_bytes(bytes(free_bytes(small_disk) - 400_000))
    saver.save(engine, content(2))
    saver.wait()
    assert "NO CHECKPOINT" in caplog.text and "disk or the quota is full" in caplog.text
    assert published(small_disk) == [1]
    assert not folders.working_folder_of(small_disk, 2).exists(), "it would take the room of the next attempt"
    (small_disk / "ballast").unlink()
    saver.save(engine, content(3))
    assert saver.finish() == ""
    assert published(small_disk) == [1, 3]
    assert problems(folders.folder_of(small_disk, 1)) == problems(folders.folder_of(small_disk, 3)) == []


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_bsize


def test_the_run_stops_after_failures_in_a_row(engine: Any, open_one: Any, small_disk: Path) -> None:
    saver = open_one(small_disk, max_failures=2)
    saver.save(engine, content(1))
    saver.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for step in (2, 3, 4):
        saver.save(engine, content(step))
    with pytest.raises(CheckpointError, match=r"3 saves in a row.*mounted read-only.*start the same command again"):
        saver.save(engine, content(5))
    assert published(small_disk) == [1] and problems(folders.folder_of(small_disk, 1)) == []


def test_the_last_checkpoint_is_tried_again_until_there_is_room(
    engine: Any, open_one: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = open_one(small_disk)
    (small_disk / "ballast").write_bytes(bytes(free_bytes(small_disk) - 100_000))
    monkeypatch.setattr(save.time, "sleep", lambda _: (small_disk / "ballast").unlink(missing_ok=True))
    saver.save(engine, content(7))
    assert saver.finish() == ""
    assert published(small_disk) == [7]


def test_too_few_open_files_are_named(
    engine: Any, open_one: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = open_one(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    try:
        saver.save(engine, content(1))
        saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in caplog.text
    saver.save(engine, content(2))
    saver.finish()
    assert published(tmp_path) == [2]


class Payload:
    """An object that, where it is unpickled, makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


@pytest.fixture
def checkpoint(engine: Any, ranks: Ranks, tmp_path: Path) -> Path:
    """A checkpoint of the engine, with what a run notes of its layout."""
    saver = open_saver(tmp_path / "checkpoints", ranks, Checkpoint(asynchronous=False), None)
    state = {"step": 1, "zero_stage": 1, "world_size": 1, "recipe": {"zero": {"stage": 1, "offload": "none"}}}
    saver.save(engine, Content(1, state, "run: {}\n"))
    saver.close()
    return folders.folder_of(tmp_path / "checkpoints", 1)


def poison(folder: Path, name: str, proof: Path, write: Callable[[dict[str, Any], Path], None]) -> None:
    """Put a payload into a file, and its right hash into the manifest, as whoever made both would."""
    content = torch.load(folder / name, weights_only=False)
    write(content | {"more": Payload(proof)}, folder / name)
    manifest = read_manifest(folder)
    entries = tuple(describe_file(folder, entry.path) for entry in manifest.files)
    write_manifest(folder, replace(manifest, files=entries))


def archive(content: Any, path: Path) -> None:
    torch.save(content, path)


def old_format(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def bare_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content["more"]))


def files(checkpoint: Path) -> list[str]:
    return [entry.path for entry in read_manifest(checkpoint).files if entry.path.endswith(".pt")]


@pytest.mark.parametrize("write", [archive, old_format, bare_pickle])
def test_no_file_of_a_checkpoint_runs_code(
    engine: Any, ranks: Ranks, checkpoint: Path, tmp_path: Path, write: Callable[[dict[str, Any], Path], None]
) -> None:
    names = files(checkpoint)
    assert len(names) == 2, "the model's file and the optimiser's"
    for number, name in enumerate(names):
        proof, copy = tmp_path / f"proof_{number}", tmp_path / f"copy_{number}" / "checkpoints" / checkpoint.name
        shutil.copytree(checkpoint, copy)
        poison(copy, name, proof, write)
        with pytest.raises(CheckpointError, match="posix.system|can't be read") as read:
            consolidated_state(copy)
        found = find_checkpoint(copy.parent, ranks, "auto")
        assert found is not None, "its hashes are right"
        with pytest.raises(CheckpointError, match="posix.system|can't be read"):
            load(engine, found, Layout.of(1, found.state["recipe"]["zero"]), [["0.weight", "0.bias"]])
        assert not proof.exists(), f"{name} was run"
        assert "weights_only" not in str(read.value) and "safe_globals" not in str(read.value), read.value
