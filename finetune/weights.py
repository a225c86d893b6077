"""Weights of our own runs, straight from their checkpoints."""

from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.consolidate import consolidated_state, is_checkpoint, newest_checkpoint
from pretrain.engine.folder import RunFolder

#: Name under which an objective holds its model.
MODEL = "model."


def is_ours(path: str) -> bool:
    """Whether a path is a run folder or a checkpoint in one, not a file or an exported folder."""
    return is_checkpoint(Path(path)) or RunFolder(Path(path)).checkpoints.is_dir()


def model_state(path: Path) -> dict[str, Tensor]:
    """The weights of the model in a checkpoint, or in the newest one of a run that verifies.

    Raises:
        CheckpointError: there is none that verifies.
    """
    folder = path if is_checkpoint(path) else newest_checkpoint(RunFolder(path).checkpoints)
    state = consolidated_state(folder)
    return {name.removeprefix(MODEL): value for name, value in state.items() if name.startswith(MODEL)}
