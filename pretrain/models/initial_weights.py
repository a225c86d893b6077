"""Weights that a run starts from: of a run of ours, one of its checkpoints, or a file in any layout."""

import logging
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.consolidate import consolidated_state, is_checkpoint, newest_checkpoint
from pretrain.checkpoint.restore import local_copy
from pretrain.models.averages import split_averages
from pretrain.models.frozen import HUB, locate
from pretrain.models.weight_files import read_raw
from pretrain.runtime.run_folder import RunFolder

logger = logging.getLogger(__name__)


def read_weights(path: str, averaged: bool = True) -> dict[str, Tensor]:
    """Read the weights at `path`: a run of ours, one of its checkpoints, or a file or folder in any layout, any URL.

    `hub:owner/name[@revision]` names a model on the Hugging Face hub, see `frozen.locate`.

    Of a checkpoint only the model is taken, not what its objective holds beside it; its averages, where `averaged` and
    there are some, in place of what they are averages of.
    """
    if path.startswith(HUB):
        path = locate("run.init_weights", path)
    source = weights_source(path)
    if not is_checkpoint(source):
        return read_raw(path)
    weights, averages = split_averages(consolidated_state(source))
    if averages:
        logger.info("%s has averaged weights; run.init_averaged=%s takes %s ones", path, str(averaged).lower(),
                    "the averaged" if averaged else "the live")  # fmt: skip
    # The averages are what the run evaluated and tested; its live weights nobody has measured.
    return weights | averages if averaged else weights


def weights_source(path: str | Path) -> Path:
    """Find a run's newest checkpoint that verifies, fetched where it was uploaded; anything else is what it is."""
    place = local_copy(Path(path).expanduser() if str(path).startswith("~") else path)
    checkpoints = RunFolder(place).checkpoints
    return newest_checkpoint(checkpoints) if checkpoints.is_dir() else place
