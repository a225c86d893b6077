"""This process's place among the ranks, and joining them."""

import logging
import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from pretrain.errors import TrainingError
from pretrain.runtime.flight_recorder import keep_collectives
from pretrain.runtime.roll_call import roll_call

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: A rank that never shows up ends the others after this; torch would wait for 30 minutes.
JOIN_TIMEOUT_S = 120.0

#: Longest time that ranks wait for each other then; the watchdog shortens it for ordinary steps.
WORK_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Ranks:
    """This process among all: global rank, number of ranks, rank on this machine, and the device it computes on.

    `joined` is false where the process group was there already, made by a program that calls `train` as a function.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    joined: bool = True

    @property
    def first(self) -> bool:
        """True on rank 0, the one that writes."""
        return self.rank == 0


def launch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Find RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as the launcher meant them.

    The deepspeed launcher and torchrun set these five. Under Slurm (srun without a launcher) they come from SLURM_*.
    Otherwise this is one process on its own, and a free port is chosen.

    Raises:
        TrainingError: some but not all are set. Going on alone would train several copies of the same run.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_launcher(environ)
    # A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but is no step: it would wait for ranks in vain.
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return _from_slurm(environ)
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }


def _from_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in names if name not in environ]
    if missing:
        raise TrainingError(
            f"environment: {', '.join(missing)} not set beside {', '.join(n for n in names if n in environ)}; "
            "start with `deepspeed launch/pretrain.py`, `torchrun` or `srun`, or unset them all for a single process"
        )
    return {name: environ[name] for name in names}


def _from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """Read the ranks of an srun step. They meet on its first host; the port follows from the job and its restarts.

    The port of a killed start may be held for a while. It lies below the range that systems hand out by themselves.
    """
    first_host = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", ""))
    address = environ.get("MASTER_ADDR") or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not address or int(environ.get("SLURM_NNODES", "1")) > 1 and "MASTER_ADDR" not in environ:
        address = _first_of_nodelist(first_host)
    start = 16 * int(environ.get("SLURM_JOB_ID", "0")) + int(environ.get("SLURM_RESTART_COUNT", "0"))
    port = environ.get("MASTER_PORT", str(20000 + start % 12000))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        # The number of a task's device among those that it sees; where each is bound to its own, that is the first.
        "LOCAL_RANK": "0" if _has_own_gpu(environ) else environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": address or "127.0.0.1",
        "MASTER_PORT": port,
    }


def _has_own_gpu(environ: Mapping[str, str]) -> bool:
    """Tell whether Slurm shows each task one GPU (--gpus-per-task=1; newer versions say it as --tres-per-task)."""
    words = [word for word in environ.get("SLURM_TRES_PER_TASK", "").split(",") if word.startswith("gres/gpu")]
    # 1, or with a type: h100:1; gres/gpu=1, gres/gpu:h100:1.
    counts = [re.split("[:=]", word)[-1] for word in (environ.get("SLURM_GPUS_PER_TASK", ""), *words)]
    return "1" in counts


def _first_of_nodelist(nodelist: str) -> str:
    """Return the first host of a node list: `node[003-007,9],other` -> `node003`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.partition(",")[0]
    return head + rest.partition("]")[0].split(",")[0].split("-")[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(environ: MutableMapping[str, str] | None = None, timeout_s: float = JOIN_TIMEOUT_S) -> Ranks:
    """Join all ranks of this run and choose the device.

    `environ` (default: os.environ) gets the five variables of `launch_environment`.

    Raises:
        TrainingError: not all ranks came within `timeout_s`, there are more ranks than accelerators, this host has
            none though its torch is made for them, or the ranks compute on different kinds of device.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    environ = os.environ if environ is None else environ
    environ.update(launch_environment(environ))
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        _check_cpu_is_meant(torch.version.cuda or torch.version.hip, environ)
    device = _device(accelerator.device_name(), int(environ["LOCAL_RANK"]), accelerator.device_count())
    accelerator.set_device(device.index or 0)
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), int(environ["LOCAL_RANK"]), device, joined=False)
    meeting = f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    _leave_out_inference_op()
    keep_collectives(environ)
    started = time.monotonic()
    backend = accelerator.communication_backend_name() if device.type != "cpu" else "gloo"
    try:
        store = roll_call(environ, timeout_s, backend)
        deepspeed.init_distributed(
            backend,
            timeout=timedelta(seconds=max(timeout_s / 4, timeout_s - (time.monotonic() - started))),
            auto_mpi_discovery=False,
            verbose=False,
        )
        # Only now: rank 0 serves the store for the process group too, and the server ends with its last owner.
        del store
        dist.barrier()
        # Else the time for joining holds for every collective, and a first step that compiles would exceed it.
        set_timeout(WORK_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {rank} of {world_size} on {socket.gethostname()} could not meet the other ranks at {meeting} within "
            f"{timeout_s:.0f} s ({str(error).splitlines()[0]}). Check that every rank started, that MASTER_ADDR is "
            "reachable from all hosts and that no firewall closes the port"
        ) from error
    return Ranks(rank, world_size, int(environ["LOCAL_RANK"]), device)


def _leave_out_inference_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce when it starts on a CPU.

    Only inference uses it. Compiling needs g++ and 20 s, and a process killed near it leaves a lock file behind on
    which every later start of any program waits for ever (torch.utils.file_baton, seen).
    """
    import deepspeed

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def _check_cpu_is_meant(built_for: str | None, environ: Mapping[str, str]) -> None:
    """Refuse to train on the CPU of a host whose GPUs can't be seen: it would take months, or meet no other rank."""
    if built_for is not None and environ.get("DS_ACCELERATOR") != "cpu":
        shown = environ.get("CUDA_VISIBLE_DEVICES")
        limited = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown!r})"
        raise TrainingError(
            f"{socket.gethostname()}: torch {torch.__version__} is made for GPUs and sees none here{limited}. Check "
            "`nvidia-smi`, the driver's version, and that the job or container was given GPUs; to train on the CPU on "
            "purpose, set DS_ACCELERATOR=cpu"
        )


def _device(kind: str, local_rank: int, count: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank >= count:
        raise TrainingError(
            f"local rank {local_rank} has no accelerator: this machine shows {count}; start at most {count} ranks here "
            "or check CUDA_VISIBLE_DEVICES"
        )
    return torch.device(kind, local_rank)


def present_ranks(device: torch.device) -> Ranks:
    """Describe this process among the ranks that have met, for code that is handed no `Ranks`; alone where none have.

    Args:
        device: that the caller's tensors lie on.
    """
    if not dist.is_initialized():
        return Ranks(0, 1, 0, device, joined=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), device, joined=False)


def leave(ranks: Ranks) -> None:
    """Close the process group that `join` made, so that nothing hangs in its destructor."""
    if ranks.joined and dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(seconds: float) -> None:
    """Make collectives that this rank starts from now on fail when the others have not come after `seconds`.

    In all groups there are: DeepSpeed reduces gradients in groups of its own, whose time would stay the back end's
    (NCCL 10 minutes, gloo 30). Groups that are made later need another call.
    """
    if dist.is_initialized():
        for group in joined_groups():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def joined_groups() -> list[dist.ProcessGroup]:
    """List the process groups that this rank is in, whoever made them."""
    # torch keeps them here and offers no other list.
    groups = list(dist.distributed_c10d._world.pg_map)
    return [group for group in groups if not dist.distributed_c10d._rank_not_in_group(group)]


def gather_objects(ranks: Ranks, value: T) -> list[T]:
    """Gather the `value` of every rank, on every rank."""
    if ranks.world_size == 1:
        return [value]
    gathered = [value] * ranks.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def from_first(ranks: Ranks, value: T) -> T:
    """Return rank 0's `value` on every rank."""
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
