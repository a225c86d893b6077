"""RUN/guard.json: rewinds so far, and the steps that they leave out.

Checkpoints hold the same, but the one that a rewind went back to is from before it: without this file a kill before the
next checkpoint would send the run into the same bad step again, with a fresh budget.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import write_durably
from pretrain.checkpoint.save import STATE
from pretrain.errors import CheckpointError
from pretrain.guards.results import GuardState
from pretrain.runtime.disk import advice
from pretrain.runtime.process_group import Ranks, from_first
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)


def guard_state(saved: dict[str, Any]) -> GuardState:
    """Read the guard's state from a checkpoint's state.json.

    Raises:
        CheckpointError: another version wrote it.
    """
    try:
        return GuardState(**saved["guard"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{STATE}: guard: not as this version writes it ({error}); finish the run with the version that began it"
        ) from error


def remember(path: Path, state: GuardState) -> None:
    """Write the file, from rank 0. A disk that does not take it costs memory of this rewind, not the run."""
    try:
        write_durably(path, json.dumps({"rewinds": state.rewinds, "skipped_steps": state.skipped_steps}) + "\n")
    except OSError as error:
        logger.warning("%s could not be written; a kill before the next checkpoint forgets: %s", path, advice(error))


def state_at_start(path: Path, ranks: Ranks, saved: dict[str, Any] | None) -> GuardState:
    """Build the guard's state as a run starts or goes on; the same on all ranks.

    Args:
        path: RUN/guard.json.
        ranks: This process among all.
        saved: state.json of the checkpoint that the run goes on from; None: it starts, and the file is removed.

    Raises:
        CheckpointError: the file is damaged.
    """
    if saved is None:
        if ranks.first:
            # Of an earlier run in this folder: a fresh start must not leave out what that one did.
            path.unlink(missing_ok=True)
        return GuardState()
    state = guard_state(saved)
    try:
        # Rank 0's text for all: ranks that read different versions from a file server would leave out different steps.
        text = from_first(ranks, path.read_text(encoding="utf-8") if ranks.first and path.exists() else "{}")
        noted = parse_json(text)
        # Either may know more: the file after a rewind, the checkpoint where the file could not be written.
        state.rewinds = max(state.rewinds, noted.get("rewinds", 0))
        state.skipped_steps = sorted({*state.skipped_steps, *noted.get("skipped_steps", [])})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: unreadable ({error}); remove it: the steps that rewinds left out are then trained on again"
        ) from error
    return state
