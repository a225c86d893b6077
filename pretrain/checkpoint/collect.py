"""Taking from DeepSpeed what it would write, without letting it write: no file is touched while training waits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint.rank_state import RankState
from pretrain.checkpoint.sharded_buffers import noted_shapes, split_buffers
from pretrain.checkpoint.snapshot import HostCopies

#: An engine whose objective keeps nothing on each rank beside its weights.
NO_RANK_STATE: Mapping[str, RankState] = {}


@dataclass
class Collected:
    """Files that one rank has to write.

    Attributes:
        states: Path and content of each file.
        afterwards: Further writes, such as DeepSpeed's scripts that merge shards.
        rank_state: Queues and banks of this rank by name.
    """

    states: list[tuple[Path, Any]] = field(default_factory=list)
    afterwards: list[Callable[[], None]] = field(default_factory=list)
    rank_state: Mapping[str, RankState] = field(default_factory=dict)


class _Collector:
    """Stand-in for DeepSpeed's checkpoint engine during one save (deepspeed.runtime.checkpoint_engine)."""

    def __init__(self, copies: HostCopies | None) -> None:
        self.collected = Collected()
        self._copies = copies

    def save(self, state_dict: Any, path: str) -> None:
        content = state_dict if self._copies is None else self._copies.take(state_dict)
        self.collected.states.append((Path(path), content))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make no folder: it comes with the files. A failure here, on one rank, would leave the others at a barrier."""

    def create(self, info: Any) -> None:
        """Prepare nothing."""

    def commit(self, info: Any) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True


def collect(
    engine: Any,
    folder: Path,
    tag: str,
    copies: HostCopies | None,
    rank_state: Mapping[str, RankState] = NO_RANK_STATE,
) -> Collected:
    """Collect what this rank writes for a checkpoint of a DeepSpeed engine in `folder`; all ranks call it together.

    Args:
        engine: DeepSpeed's engine.
        folder: The checkpoint's folder; need not exist.
        tag: DeepSpeed's folder in it.
        copies: Where states are copied to; None: the states themselves, which the next step changes.
        rank_state: What the objective keeps on this rank beside its weights.
    """
    split_buffers(engine)
    collector = _Collector(copies)
    own_engine, copy_scripts = engine.checkpoint_engine, engine._copy_recovery_script
    if copies is not None:
        copies.begin()
    engine.checkpoint_engine = collector
    engine._copy_recovery_script = lambda path: collector.collected.afterwards.append(lambda: copy_scripts(path))
    try:
        # Without `latest`: DeepSpeed would write it to the disk at once, past this engine, while all ranks wait.
        engine.save_checkpoint(str(folder), tag=tag, client_state=noted_shapes(engine.module), save_latest=False)
    finally:
        engine.checkpoint_engine = own_engine
        del engine._copy_recovery_script  # the class's own is found again
    collector.collected.rank_state = rank_state
    if copies is not None:
        taken = {name: replace(state, tensor=copies.take(state.tensor)) for name, state in rank_state.items()}
        collector.collected.rank_state = taken
        copies.end()
    return collector.collected
