import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import Manifest, describe_file, write_manifest
from pretrain.checkpoint.reshape import Layout
from pretrain.checkpoint.resume import Resumable, find_checkpoint, layout_of
from pretrain.checkpoint.same_run import check_same_run, is_harmless
from pretrain.errors import CheckpointError
from pretrain.recipe.schema import Recipe, Source
from pretrain.runtime.process_group import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def publish(root: Path, step: int) -> Path:
    folder = folders.folder_of(root, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (folder / "weights").write_bytes(b"w" * 100)
    write_manifest(folder, Manifest(step, tuple(describe_file(folder, name) for name in ("state.json", "weights"))))
    return folder


def found_step(root: Path, resume: str = "auto") -> int | None:
    found = find_checkpoint(root, ALONE, resume)
    return found.step if found else None


def test_nothing_there_means_a_start(tmp_path: Path) -> None:
    assert found_step(tmp_path / "checkpoints") is None


def test_newest_that_verifies_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (4, 8, 12):
        publish(tmp_path, step)
    (folders.folder_of(tmp_path, 12) / "weights").write_bytes(b"w" * 99)
    assert found_step(tmp_path) == 8
    assert "step_00000012 is damaged and skipped" in caplog.text
    assert "99 bytes instead of 100" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    (publish(tmp_path, 4) / "weights").unlink()
    with pytest.raises(CheckpointError, match="none of 1 checkpoints verifies"):
        find_checkpoint(tmp_path, ALONE)


def test_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    assert found_step(tmp_path, "never") is None
    publish(tmp_path, 4)
    with pytest.raises(CheckpointError, match="--resume never"):
        find_checkpoint(tmp_path, ALONE, "never")


def test_going_back_to_an_earlier_checkpoint_moves_later_ones_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        publish(tmp_path, step)
    assert found_step(tmp_path, str(folders.folder_of(tmp_path, 8))) == 8
    assert [folder.name for folder in folders.published(tmp_path)] == ["step_00000004", "step_00000008"]
    assert found_step(tmp_path) == 8


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(tmp_path: Path) -> None:
    publish(tmp_path, 4)
    (publish(tmp_path, 8) / "weights").write_bytes(b"v" * 100)
    with pytest.raises(CheckpointError, match="content differs"):
        find_checkpoint(tmp_path, ALONE, str(folders.folder_of(tmp_path, 8)))
    assert len(folders.published(tmp_path)) == 2


@pytest.mark.parametrize(
    ("size", "zero", "fits"),
    [
        (2, {"stage": 1, "offload": "none"}, True),
        (4, {"stage": 1, "offload": "none"}, False),
        (2, {"stage": 2, "offload": "none"}, False),
        (2, {"stage": 0, "offload": "none"}, False),
        (2, {"stage": 1, "offload": "cpu"}, False),
    ],
)
def test_only_the_same_layout_is_loaded_as_it_is(size: int, zero: dict[str, Any], fits: bool) -> None:
    state = {"step": 1, "world_size": 2, "recipe": {"zero": {"stage": 1, "offload": "none"}}}
    assert layout_of(Resumable(Path("x"), state)).fits(Layout.of(size, zero)) == fits


def test_without_zero_any_number_of_ranks_loads_it_as_it_is() -> None:
    assert Layout.of(2, {"stage": 0, "offload": "cpu"}).fits(Layout(8, 0))


def recipe() -> Recipe:
    config = OmegaConf.structured(Recipe(model={"dim": 8}, objective={"mask_ratio": 0.9}, input={}))
    config.run.name = "test"
    made: Recipe = OmegaConf.to_object(config)
    made.data.sources = {"toy": Source(shards="here")}
    return made


def test_the_same_recipe_continues() -> None:
    stored = json.loads(json.dumps(asdict(recipe())))
    assert check_same_run(stored, recipe(), "x") == []


def test_keys_that_came_later_continue_at_their_defaults() -> None:
    stored = asdict(recipe())
    del stored["optim"]["momentum"]
    assert check_same_run(stored, recipe(), "x") == []
    other = recipe()
    other.optim.momentum = 0.5
    with pytest.raises(CheckpointError, match="optim.momentum: None -> 0.5"):
        check_same_run(stored, other, "x")


def test_harmless_differences_are_named() -> None:
    other = recipe()
    other.data.workers, other.log.every_steps, other.data.sources["toy"].shards = 3, 7, "there"
    other.data.affinity = "none"
    lines = check_same_run(asdict(recipe()), other, "x")
    assert lines == [
        "data.affinity: 'device' -> 'none'",
        "data.sources.toy.shards: 'here' -> 'there'",
        "data.workers: None -> 3",
        "log.every_steps: 10 -> 7",
    ]


def test_every_serious_difference_is_listed_at_once() -> None:
    other = recipe()
    other.model["dim"], other.run.seed, other.data.workers = 16, 5, 3
    other.optim = dataclasses.replace(other.optim, betas=(0.9, 0.99))
    with pytest.raises(CheckpointError) as caught:
        check_same_run(asdict(recipe()), other, "x")
    for piece in ("model.dim: 8 -> 16", "run.seed: 0 -> 5", "optim.betas: [0.9, 0.95] -> [0.9, 0.99]", "run.dir"):
        assert piece in str(caught.value)
    assert "data.workers" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["data.lanes", "batch.samples", "data.sources.toy.weight", "compute.dtype", "model.log"]
)
def test_keys_that_change_what_is_learnt_are_not_harmless(key: str) -> None:
    assert not is_harmless(key)
