"""Whole weights out of a checkpoint that many ranks wrote."""

import json
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import MANIFEST, problems
from pretrain.checkpoint.save import STATE, TAG
from pretrain.errors import CheckpointError

#: File in which DeepSpeed keeps the weights of a run that shards nothing.
UNSHARDED = "mp_rank_00_model_states.pt"


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of ours (one that was never finished has no manifest)."""
    return (folder / MANIFEST).is_file()


def newest_checkpoint(root: Path) -> Path:
    """The newest checkpoint below `root` that verifies.

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
    """Float32 weights by the names that they have in the objective, merged from the shards of all ranks.

    The files are unpickled by DeepSpeed; only a checkpoint whose hashes verify gets that far.

    Raises:
        CheckpointError: the checkpoint does not verify.
    """
    wrong = problems(folder)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    if json.loads((folder / STATE).read_text(encoding="utf-8"))["zero_stage"] == 0:
        content = torch.load(folder / TAG / UNSHARDED, map_location="cpu", weights_only=False)
        return {name: value.float() for name, value in content["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return state
