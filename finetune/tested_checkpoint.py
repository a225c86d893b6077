"""Checkpoint of a run that a task tests: whether, which, and its weights on this rank."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.recipe import TuneRecipe
from pretrain.checkpoint.consolidate import newest_checkpoint
from pretrain.checkpoint.folders import folder_of
from pretrain.checkpoint.reshape import Layout
from pretrain.checkpoint.resume import load_weights, open_verified
from pretrain.engine.build import build_engine
from pretrain.errors import CheckpointError
from pretrain.objectives.base import Method
from pretrain.runtime.dtypes import DTYPES
from pretrain.runtime.process_group import Ranks, from_first
from pretrain.runtime.run_folder import RunFolder
from pretrain.runtime.untrusted import parse_json
from pretrain.trained.load_run import load_checkpoint

#: What a test without shards ends with.
NO_SHARDS = "test: no source has test or val shards; give data.sources.<name>.test=FOLDER"


def wants_test(recipe: TuneRecipe) -> bool:
    """Tell whether there is something to test at the end, and the run went to its end."""
    stopped_early = recipe.schedule.max_steps is not None
    held_out = any(source.test or source.val for source in recipe.data.sources.values())
    return recipe.evaluate.test != "none" and held_out and not stopped_early


def choose_checkpoint(recipe: TuneRecipe, ranks: Ranks, which: str) -> Path:
    """Find the folder of the checkpoint that all ranks test.

    Args:
        recipe: the run.
        ranks: this process among all.
        which: "last", "best", or the folder of a checkpoint.

    Raises:
        CheckpointError: it is not there.
    """
    root = Path(recipe.run.dir).absolute()
    # One rank chooses: hosts may see different newest checkpoints on a shared file system.
    return Path(from_first(ranks, str(find(root, which)) if ranks.first else ""))


def predictions_of(recipe: TuneRecipe, checkpoint: Path) -> Path:
    """Name the folder that a test of a checkpoint writes to."""
    return Path(recipe.run.dir).absolute() / "predictions" / checkpoint.name


def find(root: Path, which: str) -> Path:
    """Find the folder of a checkpoint of the run in `root`.

    Raises:
        CheckpointError: it is not there.
    """
    if which == "last":
        return newest_checkpoint(RunFolder(root).checkpoints)
    if which != "best":
        return Path(which).absolute()
    note = root / "best.json"
    if not note.is_file():
        raise CheckpointError(f"{note}: not there, so no step was evaluated; test --test last, or give val shards")
    return folder_of(RunFolder(root).checkpoints, parse_json(note.read_text(encoding="utf-8"))["step"])


def load_objective(method: Method, ranks: Ranks, checkpoint: Path) -> Any:
    """Load the trained module onto this rank's device, in evaluation mode; sharded where training sharded it."""
    recipe = method.recipe
    # Sharded again: what needed stage 3 may not fit a device whole.
    if recipe.zero.stage == 3:
        accumulation = recipe.batch.samples // (recipe.batch.micro * ranks.world_size)
        built = build_engine(method, ranks, accumulation, resumes=True)
        here = Layout.of(ranks.world_size, asdict(recipe.zero))
        load_weights(built.engine, open_verified(checkpoint, ranks), here, built.groups)
        return built.engine.module.eval()
    objective = method.build()
    load_checkpoint(objective, checkpoint)
    return objective.to(device=ranks.device, dtype=DTYPES[recipe.compute.dtype]).eval()
