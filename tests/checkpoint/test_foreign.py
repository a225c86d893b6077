"""Checkpoints from strangers: nothing in any of their files is run, whoever reads it."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import folders
from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.checkpoint.manifest import describe_file, read_manifest, write_manifest
from pretrain.checkpoint.reshape import Layout
from pretrain.checkpoint.resume import find_checkpoint, load
from pretrain.checkpoint.save import Content, open_saver
from pretrain.errors import CheckpointError
from pretrain.recipe.schema import Checkpoint
from pretrain.runtime.process_group import Ranks


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
