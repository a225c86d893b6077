"""Weights of our own runs, straight from their checkpoints."""

import json
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import MANIFEST, problems
from pretrain.checkpoint.save import STATE, TAG
from pretrain.engine.folder import RunFolder
from pretrain.errors import CheckpointError

#: Name under which an objective holds its model.
MODEL = "model."
#: DeepSpeed's file with the whole module, up to ZeRO stage 2.
MODULE = "mp_rank_00_model_states.pt"


def is_ours(path: str) -> bool:
    """Whether a path is a run folder or a checkpoint in one, not a file or an exported folder."""
    return (Path(path) / MANIFEST).is_file() or RunFolder(Path(path)).checkpoints.is_dir()


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run that verifies.

    Raises:
        CheckpointError: there is none.
    """
    found = []
    for folder in reversed(folders.published(RunFolder(run).checkpoints)):
        wrong = problems(folder)
        if not wrong:
            return folder
        found.append("; ".join(wrong))
    raise CheckpointError(f"{run}: no checkpoint that verifies" + "".join(f"\n  {line}" for line in found))


def objective_state(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that the objective of a checkpoint holds, as the run computed with it (bf16 values as float32).

    Only a checkpoint whose hashes verify is unpickled.

    Raises:
        CheckpointError: it does not verify, or its weights are sharded (ZeRO stage 3).
    """
    wrong = problems(checkpoint)
    if wrong:
        raise CheckpointError(f"{checkpoint}: {'; '.join(wrong)}")
    if json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["zero_stage"] == 3:
        raise CheckpointError(f"{checkpoint}: weights sharded by zero.stage=3; merge them with launch/export.py")
    content = torch.load(checkpoint / TAG / MODULE, map_location="cpu", weights_only=False)
    return {name: value.float() if value.is_floating_point() else value for name, value in content["module"].items()}


def model_state(path: Path) -> dict[str, Tensor]:
    """The weights of the model in a checkpoint, or in the newest one of a run that verifies.

    Raises:
        CheckpointError: there is none that verifies.
    """
    folder = path if (path / MANIFEST).is_file() else newest_checkpoint(path)
    state = objective_state(folder)
    return {name.removeprefix(MODEL): value for name, value in state.items() if name.startswith(MODEL)}
