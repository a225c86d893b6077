"""The files of a DeepSpeed checkpoint: their names, and what is noted in them of the parameters."""

import importlib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.sharded_buffers import NOTE
from pretrain.errors import CheckpointError
from pretrain.runtime.untrusted import foreign_objects

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


#: The classes that DeepSpeed stores beside tensors and plain values, by module. Each of them only keeps attributes.
STORED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


def load_file(path: Path, mapped: bool = True) -> dict[str, Any]:
    """Read a file of tensors, plain values and DeepSpeed's own classes, without running anything that it names.

    Args:
        path: of the file.
        mapped: Leave tensors in the file until they are used.

    Raises:
        CheckpointError: it holds anything else, or is damaged.
    """
    try:
        # Never all that pickle can: who gives a checkpoint gives its manifest too, so right hashes prove nothing.
        with torch.serialization.safe_globals(_stored_classes()):
            content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: {_reason(path, error)}") from error
    return content


def _stored_classes() -> list[Any]:
    # Imported here: readers of weights need no DeepSpeed until they meet one of its files.
    stored = ((module, name) for module, names in STORED_CLASSES.items() for name in names)
    return [getattr(importlib.import_module(module), name) for module, name in stored]


def _reason(path: Path, error: Exception) -> str:
    """Say why a file was not read, with the names in it that are not allowed; torch's advice is to run them."""
    if foreign := foreign_objects(str(path), _stored_classes()):
        return (
            f"it holds {', '.join(foreign)}, and a checkpoint holds tensors, plain values and classes of "
            "DeepSpeed only; nothing of it was run. Where you trust it, take its weights over as safetensors"
        )
    return f"can't be read as tensors and plain values ({(str(error) or type(error).__name__).splitlines()[0]})"


@contextmanager
def read_safely(engine: Any) -> Iterator[None]:
    """Make DeepSpeed read its files through `load_file` while it loads a checkpoint."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = _SafeReader(own)
    try:
        yield
    finally:
        engine.checkpoint_engine = own


class _SafeReader:
    """Stand-in for DeepSpeed's checkpoint engine while it loads (deepspeed.runtime.checkpoint_engine)."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        """Read a file to the CPU, from where DeepSpeed copies what it needs."""
        # Not mapped: DeepSpeed keeps some of these tensors, and training would go on in a file that retention removes.
        return load_file(Path(path), mapped=False)


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
