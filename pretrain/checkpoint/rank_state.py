"""Queues and banks: tensors that an objective keeps on each rank beside its weights.

    rank_state/rank_00000.pt     of rank 0, with what is the same on all ranks
    rank_state/rank_00001.pt     of the next one, where it has any of its own

On the number of ranks that wrote them they are restored bit for bit; on another one by the rule that each states.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.checkpoint.deepspeed_files import load_file
from pretrain.errors import CheckpointError
from pretrain.runtime.tensors import weights_digest

logger = logging.getLogger(__name__)

#: Folder of a checkpoint that holds them.
FOLDER = "rank_state"

#: What becomes of a tensor on another number of ranks.
Reshape = Literal["same_on_all", "concatenate_positions", "by_owner", "start_anew"]

SAME, BY_POSITION, BY_OWNER, ANEW = "same_on_all", "concatenate_positions", "by_owner", "start_anew"


@dataclass(frozen=True)
class RankState:
    """A tensor of this rank, any dtype and device, that the objective updates in place: restoring copies into it.

    `reshape` says what another number of ranks makes of it:

    - same_on_all: every rank holds the same values, now and then; a save compares them and fails where they differ.
      Counters belong here, counted over all ranks (samples put into a queue, say), never in rows of one rank.
    - concatenate_positions: row j of rank r of R is row j * R + r of the whole, as samples are dealt to ranks; the
      whole is dealt out again in the same way. Rows of all ranks must add up to the same number.
    - by_owner: what the tensor holds, of any size, says itself which rank it belongs to. Nothing is copied into it:
      `take` is given what this rank wrote, or on another number of ranks what each of them wrote, in their order, with
      this rank and the number of ranks now, and keeps what is this rank's.
    - start_anew: it stays as it was built, and a line at WARNING says so.
    """

    tensor: Tensor
    reshape: Reshape
    take: Callable[[Sequence[Tensor], int, int], None] | None = None

    def restore(self, values: Tensor, rank: int, world_size: int) -> None:
        """Take back what `tensor` held before, on this rank of `world_size`."""
        if self.take is not None:
            self.take([values], rank, world_size)
        else:
            self.tensor.copy_(values)


def write_rank_state(folder: Path, states: Mapping[str, RankState], rank: int) -> list[str]:
    """Write this rank's tensors into the checkpoint `folder`; returns the paths of files relative to it."""
    own = {name: state for name, state in states.items() if rank == 0 or state.reshape != SAME}
    if not own:
        return []
    path = _file(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: {"tensor": state.tensor.detach(), "reshape": state.reshape} for name, state in own.items()}, path)
    return [str(path.relative_to(folder))]


def digests(states: Mapping[str, RankState]) -> dict[str, str]:
    """Hash the bytes of each tensor that must be the same on all ranks."""
    return {name: weights_digest({name: state.tensor}) for name, state in states.items() if state.reshape == SAME}


def unequal(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Compare the `digests` of all ranks, in their order; one line for each tensor that is not the same on all."""
    names = sorted({name for one in found for name in one})
    others = {name: [rank for rank, one in enumerate(found) if one.get(name) != found[0].get(name)] for name in names}
    return [
        f"rank state {name} is said to be {SAME}, but rank {ranks[0]}{' and others' if ranks[1:] else ''} of "
        f"{len(found)} have other values than rank 0: the objective must update it from what all ranks gathered"
        for name, ranks in others.items()
        if ranks
    ]


def load_rank_state(folder: Path, states: Mapping[str, RankState], before: int, rank: int, world_size: int) -> None:
    """Copy what the checkpoint `folder` holds into the tensors of this rank.

    Args:
        folder: A checkpoint whose hashes verified.
        states: The tensors to fill, by name.
        before: Number of ranks that wrote it.
        rank: This rank.
        world_size: Number of ranks now.

    Raises:
        CheckpointError: other names, rules, formats or sizes are in the checkpoint.
    """
    first = _read(folder, 0)
    _check_names(folder, first, states)
    if not states:
        return
    parts = [first, *(_read(folder, other) for other in range(1, before))] if before != world_size else []
    own = _read(folder, rank) if before == world_size and rank else first
    for name, state in states.items():
        what = f"{_file(folder, rank)}: {name}"
        if state.reshape == SAME:
            _copy(first[name]["tensor"], state.tensor, what)
        elif state.reshape == BY_OWNER:
            assert state.take is not None, f"rank state {name}: {BY_OWNER} needs `take`"
            written = enumerate(parts) if parts else [(rank, own)]
            state.take([_of_rank(part, name, folder, number) for number, part in written], rank, world_size)
        elif before == world_size:
            _copy(_of_rank(own, name, folder, rank), state.tensor, what)
        elif state.reshape == BY_POSITION:
            rows = [_of_rank(part, name, folder, number) for number, part in enumerate(parts)]
            _copy(_deal(rows, rank, world_size), state.tensor, f"{what}, dealt from {before} to {world_size} ranks")
        else:
            logger.warning(
                "rank state %s STARTS ANEW: %s was written by %d ranks, this run has %d, and what is in it can't be "
                "dealt out again (rule %s)",
                *(name, folder, before, world_size, ANEW),
            )


def _file(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"rank_{rank:05d}.pt"


def _read(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Read a rank's file, mapped from the disk; empty where it wrote none."""
    path = _file(folder, rank)
    if not path.is_file():
        return {}
    return load_file(path)


def _check_names(folder: Path, stored: Mapping[str, Mapping[str, Any]], states: Mapping[str, RankState]) -> None:
    before = {name: entry["reshape"] for name, entry in stored.items()}
    now = {name: state.reshape for name, state in states.items()}
    wrong = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if wrong:
        found = ", ".join(f"{name} {before.get(name, 'missing')} -> {now.get(name, 'missing')}" for name in wrong)
        raise CheckpointError(
            f"{folder}: its rank state is not that of this run (checkpoint -> run): {found}. Continue with the recipe "
            "and release that wrote it, or start a new run.dir with run.init_weights"
        )


def _of_rank(part: Mapping[str, Mapping[str, Any]], name: str, folder: Path, rank: int) -> Tensor:
    if name not in part:
        raise CheckpointError(f"{_file(folder, rank)}: no rank state {name} there, which rank 0 has")
    tensor: Tensor = part[name]["tensor"]
    return tensor


def _deal(parts: Sequence[Tensor], rank: int, world_size: int) -> Tensor:
    """Deal out `rank`'s rows of the whole, whose row i is row i // R of part i mod R; only these rows are read."""
    total, before = sum(len(part) for part in parts), len(parts)
    rows = torch.arange(rank, total, world_size)
    dealt = parts[0].new_empty((len(rows), *parts[0].shape[1:]))
    for number, part in enumerate(parts):
        mine = rows % before == number
        dealt[mine] = part[rows[mine] // before]
    return dealt


def _copy(values: Tensor, target: Tensor, what: str) -> None:
    if values.dtype != target.dtype or values.shape != target.shape:
        raise CheckpointError(
            f"{what}: found {values.dtype} {list(values.shape)}, this run has {target.dtype} {list(target.shape)}. "
            "Continue with the recipe that wrote it, on a number of ranks among which its rows can be dealt out, or "
            "start a new run.dir with run.init_weights"
        )
    with torch.no_grad():
        target.copy_(values)
