"""The files of a DeepSpeed checkpoint: their names, and what is noted in them of the parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.sharded_buffers import NOTE
from pretrain.errors import CheckpointError

#: Names of the parameters of each group, in the order in which the optimiser has them.
Groups = list[list[str]]


@dataclass(frozen=True)
class Stored:
    """Notes of DeepSpeed on the parameters: groups and shapes of trained ones, other names of any."""

    groups: Groups
    trained: Mapping[str, torch.Size]
    aliases: Mapping[str, str]


def stored_parameters(folder: Path, world_size: int, stage: int) -> Stored:
    """Read the notes, of which there are none at stage 0, where parameters are whole.

    Raises:
        CheckpointError: files are missing.
    """
    model = load_file(model_files(folder, world_size, stage)[0])
    groups = model["param_shapes"] or []
    return Stored(
        groups=[list(group) for group in groups],
        trained={name: shape for group in groups for name, shape in group.items()},
        aliases=model.get("shared_params") or {},
    )


def load_file(path: Path) -> dict[str, Any]:
    """Unpickle a file, whose hash was verified; tensors stay in it until they are read."""
    # weights_only would refuse fp16's loss scaler, an object in DeepSpeed's files.
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return content


def sharded_shapes(model: dict[str, Any]) -> dict[str, torch.Size]:
    """Return whole shapes of frozen parameters and buffers of which each rank's file of a stage-3 model has a share."""
    return {**(model["frozen_param_shapes"] or {}), **model.get(NOTE, {})}


def model_files(folder: Path, world_size: int, stage: int) -> list[Path]:
    """Find the files with the model, by rank where each has its own.

    Raises:
        CheckpointError: files are missing.
    """
    if stage < 3:
        return _existing([folder / "mp_rank_00_model_states.pt"])
    return _existing([folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)])


def optimizer_files(folder: Path, world_size: int, stage: int) -> list[Path]:
    """Find the files with each rank's part of the optimiser; none without ZeRO, where it is in the model's file.

    Raises:
        CheckpointError: files are missing.
    """
    if stage == 0:
        return []
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
    # DeepSpeed puts `bf16_` in front of the names where it trains in that format.
    prefix = "bf16_" if (folder / f"bf16_{names[0]}").exists() else ""
    return _existing([folder / f"{prefix}{name}" for name in names])


def _existing(paths: list[Path]) -> list[Path]:
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(f"{paths[0].parent}: {len(missing)} of {len(paths)} files missing: {', '.join(missing)}")
    return paths
