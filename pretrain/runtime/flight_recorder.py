"""Torch's flight recorder: the last collectives of each rank, written beside the stacks when a step hangs.

    stacks/collectives_step_00000012/rank_3         of NCCL: what torch's own tool compares,
                                                    torchfrtrace --prefix rank_ RUN/stacks/collectives_step_00000012
    stacks/collectives_step_00000012/rank_3.json    of another back end, to be read: that tool fails on gloo's (2.13)

Stacks tell where Python waits; on an accelerator that is often many collectives behind the one that hangs.
"""

from collections.abc import MutableMapping
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

#: Collectives that torch keeps; its own name for the number, and the one before. 0 in either turns it off.
VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
KEPT = "2000"

#: Functions of torch that give the record, and the ending of the file: of NCCL's groups, and of all other ones. Which
#: exist depends on its build.
NCCL, OTHERS = ("_dump_nccl_trace", ""), ("_dump_fr_trace_json", ".json")


def keep_collectives(environ: MutableMapping[str, str]) -> None:
    """Turn the recorder on where the user said nothing of it; call it before the process group is made."""
    if not any(name in environ for name in VARIABLES):
        environ[VARIABLES[0]] = KEPT


def dump_collectives(folder: Path, rank: int, step: int) -> Path | None:
    """Write this rank's last collectives below `folder`, the newest in place of what the same step wrote before.

    It may wait for locks that a hanging back end holds: call it where that does no harm (`terminal.briefly`).

    Returns:
        The file; None where this torch has no recorder, or it is turned off or empty.
    """
    if not dist.is_initialized():
        return None
    name, ending = NCCL if dist.get_backend() == "nccl" else OTHERS
    record = getattr(c10d, name, None)
    content: bytes = b"" if record is None else record()
    if not content:
        return None
    path = folder / "stacks" / f"collectives_step_{step:08d}" / f"rank_{rank}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
