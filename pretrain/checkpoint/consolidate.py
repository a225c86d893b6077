"""Whole weights out of a checkpoint that many ranks wrote."""

import contextlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import MANIFEST, problems
from pretrain.checkpoint.save import STATE, TAG
from pretrain.errors import CheckpointError

#: File in which DeepSpeed keeps the weights of a run that shards nothing.
UNSHARDED = "mp_rank_00_model_states.pt"
#: Files with each rank's part of the optimiser; the entry with weights where it is the bf16 one (ZeRO stage 1).
BF16_PARTS = "bf16_zero_pp_rank_*_mp_rank_00_optim_states.pt"
BF16_GROUPS = "single_partition_of_fp32_groups"


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

    The files are unpickled; only a checkpoint whose hashes verify gets that far.

    Raises:
        CheckpointError: the checkpoint does not verify.
    """
    wrong = problems(folder)
    if wrong:
        raise CheckpointError("; ".join(wrong))
    stage = json.loads((folder / STATE).read_text(encoding="utf-8"))["zero_stage"]
    if stage == 3:
        return _merged(folder)
    content = torch.load(folder / TAG / UNSHARDED, map_location="cpu", weights_only=False)
    whole = {name: value.float() for name, value in content["module"].items()}
    if stage == 0:
        return whole
    # The optimiser's parts hold what is trained; frozen parameters are in the whole model alone.
    parts = _bf16_parts(folder) if stage == 1 else []
    return whole | (_masters(folder, parts, content["param_shapes"]) if parts else _merged(folder))


def _merged(folder: Path) -> dict[str, Tensor]:
    """What DeepSpeed's own merger makes of the parts of all ranks."""
    # DeepSpeed tells of its progress on standard output, which belongs to the command that asked for the weights.
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    return state


def _bf16_parts(folder: Path) -> list[list[Tensor]]:
    """Each rank's piece of each parameter group, where DeepSpeed's bf16 optimiser wrote the checkpoint."""
    paths = sorted((folder / TAG).glob(BF16_PARTS), key=_rank_of)
    states = [torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"] for path in paths]
    return [state[BF16_GROUPS] for state in states if BF16_GROUPS in state]


def _masters(folder: Path, parts: list[list[Tensor]], groups: list[dict[str, torch.Size]]) -> dict[str, Tensor]:
    """Float32 weights from the pieces of the bf16 optimiser, which zero_to_fp32 does not read.

    It lays each group's parameters behind one another, pads the end, and gives every rank an equal piece.
    """
    state: dict[str, Tensor] = {}
    for number, shapes in enumerate(groups):
        line = torch.cat([part[number].flatten() for part in parts])
        sizes = [shape.numel() for shape in shapes.values()]
        if len(line) < sum(sizes):
            raise CheckpointError(f"{folder}: the parts of {len(parts)} ranks hold {len(line)} of {sum(sizes)} values")
        pieces = line[: sum(sizes)].split(sizes)
        state |= {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    return state


def _rank_of(path: Path) -> int:
    return int(path.name.removeprefix("bf16_zero_pp_rank_").partition("_")[0])
