"""Finding the checkpoint to continue from, and loading it."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import problems
from pretrain.checkpoint.save import STATE, TAG
from pretrain.errors import CheckpointError
from pretrain.runtime.process_group import Ranks, from_first, gather_objects

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
    """The checkpoint to continue from, the same on all ranks; None: start from the beginning.

    Args:
        root: The run's folder of checkpoints.
        ranks: This process among all; they share the reading.
        resume: auto: the newest that verifies; never: none may be there; otherwise the path of one.

    Raises:
        CheckpointError: checkpoints are there but none verifies, or the one that was asked for doesn't.
    """
    if ranks.first:
        folders.clean_leftovers(root)
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
        found = _problems_on_all(ranks, Path(candidate))
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
    found = _problems_on_all(ranks, folder)
    if found:
        raise CheckpointError(f"--resume {folder}: does not verify: {'; '.join(found)}")
    chosen = _open(folder)
    if ranks.first:
        folders.supersede_after(root, chosen.step)
    return chosen


def _problems_on_all(ranks: Ranks, folder: Path) -> list[str]:
    gathered = gather_objects(ranks, problems(folder, ranks.rank, ranks.world_size))
    return sorted({line for lines in gathered for line in lines})


def _open(folder: Path) -> Resumable:
    try:
        return Resumable(folder, json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE}: unreadable ({error})") from error


def check_layout(found: Resumable, world_size: int, zero_stage: int) -> None:
    """Refuse a checkpoint whose shards don't fit the present ranks.

    Raises:
        CheckpointError: another number of ranks (unless nothing is sharded), or another ZeRO stage.
    """
    old_size, old_stage = found.state["world_size"], found.state["zero_stage"]
    same_size = old_size == world_size or old_stage == zero_stage == 0
    if same_size and old_stage == zero_stage:
        return
    raise CheckpointError(
        f"{found.folder}: written by {old_size} ranks with zero.stage {old_stage}, this run has {world_size} "
        f"ranks with zero.stage {zero_stage}. Its optimiser states are sharded for the former: start {old_size} ranks "
        f"with zero.stage={old_stage}, or a new run.dir with run.init_weights={found.folder}"
    )


def load(engine: Any, found: Resumable) -> None:
    """Load weights, optimiser states and loss scale into a DeepSpeed engine.

    The files were written by this program and their hashes verified, so DeepSpeed may unpickle them; checkpoints from
    elsewhere never come this way (run.init_weights reads tensors only).
    """
    path, _ = engine.load_checkpoint(str(found.folder), tag=TAG, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{found.folder / TAG}: DeepSpeed found nothing to load")
