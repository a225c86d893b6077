"""Whole weights out of a checkpoint that many ranks wrote."""

from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import folders
from pretrain.checkpoint.deepspeed_files import stored_parameters
from pretrain.checkpoint.manifest import MANIFEST, problems
from pretrain.checkpoint.partitions import WEIGHT, gather, open_shards
from pretrain.checkpoint.save import STATE, TAG
from pretrain.errors import CheckpointError
from pretrain.runtime.untrusted import parse_json


def is_checkpoint(folder: Path) -> bool:
    """Tell whether `folder` is a checkpoint of ours (one that was never finished has no manifest)."""
    return (folder / MANIFEST).is_file()


def newest_checkpoint(root: Path) -> Path:
    """Find the newest checkpoint below `root` that verifies.

    Raises:
        CheckpointError: there is none; the message says what is wrong with those that are there.
    """
    found = []
    for folder in reversed(folders.published(root)):
        wrong = problems(folder)
        if not wrong:
            return folder
        found.append("; ".join(wrong))
    raise CheckpointError(f"{root}: no checkpoint that verifies" + "".join(f"\n  {line}" for line in found))


def consolidated_state(folder: Path) -> dict[str, Tensor]:
    """Merge the shards of all ranks into float32 weights, by the names that they have in the objective.

    Raises:
        CheckpointError: the checkpoint does not verify.
    """
    wrong = problems(folder)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    state = parse_json((folder / STATE).read_text(encoding="utf-8"))
    return merged(folder / TAG, state["world_size"], state["zero_stage"])


def merged(folder: Path, world_size: int, stage: int) -> dict[str, Tensor]:
    """Merge weights and buffers in DeepSpeed's folder of a checkpoint; floating point ones in float32.

    Without ZeRO they are those of the forward pass: the optimiser's float32 copies have no names there.

    Args:
        folder: DeepSpeed's folder inside the checkpoint.
        world_size: Ranks that wrote it.
        stage: ZeRO stage that wrote it.

    Raises:
        CheckpointError: files are missing, or values in them.
    """
    stored = stored_parameters(folder, world_size, stage)
    shards = open_shards(folder, world_size, stage, stored.groups, stored.trained)
    # Trained parameters replace their copies in the computing format.
    state = {name: _copy(value) for name, value in shards.whole.items()}
    for name, part in shards.sharded.items():
        state[name] = _copy(gather(part.pieces, 0, part.shape.numel(), f"{folder}: {name}")).reshape(part.shape)
    for name, shape in stored.trained.items():
        state[name] = shards.read(WEIGHT, name, 0, shape.numel()).reshape(shape)
    # Tied weights are stored once, under one of their names; a strict load asks for all.
    return state | {alias: state[name] for alias, name in stored.aliases.items() if name in state}


def _copy(value: Tensor) -> Tensor:
    """Copy a value out of the file that it is mapped from."""
    # A mapped tensor holds its file's room on the disk, also when retention has long removed the checkpoint.
    return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
