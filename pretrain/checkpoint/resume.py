"""Finding the checkpoint to continue from, and loading it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint import folders
from pretrain.checkpoint.collect import NO_RANK_STATE
from pretrain.checkpoint.deepspeed_files import Groups, read_safely
from pretrain.checkpoint.manifest import problems_on_all
from pretrain.checkpoint.rank_state import RankState, load_rank_state
from pretrain.checkpoint.reshape import Layout, load_reshaped
from pretrain.checkpoint.save import STATE, TAG
from pretrain.checkpoint.sharded_buffers import split_buffers
from pretrain.errors import CheckpointError
from pretrain.runtime.process_group import Ranks, from_first
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumable:
    """A checkpoint that verified: its folder and its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.state["step"])


def find_checkpoint(root: Path, ranks: Ranks, resume: str = "auto") -> Resumable | None:
    """Find the checkpoint to continue from, the same on all ranks; None: start from the beginning.

    Args:
        root: The run's folder of checkpoints.
        ranks: This process among all; they share the reading.
        resume: auto: the newest that verifies; never: none may be there; otherwise the path of one.

    Raises:
        CheckpointError: checkpoints are there but none verifies, or the one that was asked for doesn't.
    """
    if ranks.first:
        folders.clean_leftovers(root)
    # Rank 0's list for all: a file server may show ranks different folders, and they would verify different ones.
    candidates = from_first(ranks, [str(folder) for folder in reversed(folders.published(root))])
    if resume == "never":
        if candidates:
            raise CheckpointError(
                f"--resume never: {root} holds {len(candidates)} checkpoints, newest {candidates[0]}; give another "
                "run.dir (or run.name), or leave --resume out to continue"
            )
        return None
    if resume != "auto":
        return _asked_for(root, ranks, Path(resume))
    for candidate in candidates:
        found = problems_on_all(ranks, Path(candidate))
        if not found:
            return _open(Path(candidate))
        logger.error("%s is damaged and skipped: %s", candidate, "; ".join(found))
    if candidates:
        raise CheckpointError(
            f"{root}: none of {len(candidates)} checkpoints verifies (see the lines above). Restore one, or move the "
            "folder away to start from the beginning"
        )
    return None


def _asked_for(root: Path, ranks: Ranks, folder: Path) -> Resumable:
    chosen = open_verified(folder, ranks, f"--resume {folder}")
    if ranks.first:
        folders.supersede_after(root, chosen.step)
    return chosen


def open_verified(folder: Path, ranks: Ranks, asked: str = "") -> Resumable:
    """Open the checkpoint in `folder` once it has verified; all ranks call it together and share the reading.

    Args:
        folder: The checkpoint.
        ranks: This process among all.
        asked: What the user said, for the message; default: the folder.

    Raises:
        CheckpointError: it does not verify.
    """
    found = problems_on_all(ranks, folder)
    if found:
        raise CheckpointError(f"{asked or folder}: does not verify: {'; '.join(found)}")
    return _open(folder)


def _open(folder: Path) -> Resumable:
    try:
        return Resumable(folder, parse_json((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: unreadable ({error})") from error


def layout_of(found: Resumable) -> Layout:
    """Return the layout that a checkpoint was written with."""
    return Layout.of(found.state["world_size"], found.state["recipe"]["zero"])


def load(
    engine: Any, found: Resumable, now: Layout, groups: Groups, rank_state: Mapping[str, RankState] = NO_RANK_STATE
) -> None:
    """Load weights, optimiser states, loss scale and rank state, whichever layout wrote them.

    The same layout is DeepSpeed's to load, each rank its own files; others are converted (`reshape`). Nothing in the
    files is run (`deepspeed_files.load_file`): `--resume` takes checkpoints from anywhere.

    Args:
        engine: The engine, trained or not.
        found: The checkpoint.
        now: The engine's layout.
        groups: Names of the optimiser's parameters by group, in its order.
        rank_state: What the objective keeps on this rank beside its weights; filled in place.

    Raises:
        CheckpointError: it is incomplete, or of another optimiser, other parameters or other rank state.
    """
    before = layout_of(found)
    if before.fits(now):
        split_buffers(engine)
        # No scheduler's state: the rate is a function of the step (engine/schedules.py).
        with read_safely(engine):
            path, _ = engine.load_checkpoint(str(found.folder), tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"{found.folder / TAG}: DeepSpeed found nothing to load")
    else:
        load_reshaped(engine, found.folder / TAG, before, now, groups)
    load_rank_state(found.folder, rank_state, before.world_size, dist.get_rank(), now.world_size)


def load_weights(engine: Any, found: Resumable, now: Layout, groups: Groups) -> None:
    """Load what a forward pass uses into an engine that does not train, whichever layout wrote it; arguments of `load`.

    Raises:
        CheckpointError: it is incomplete, or of other parameters.
    """
    load_reshaped(engine, found.folder / TAG, layout_of(found), now, groups, weights_only=True)
