"""Checks of this host that need nothing but itself: limits, memory, disk, arithmetic."""

import math
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

from pretrain.runtime.findings import Finding
from pretrain.runtime.speed import matmul_tflops, synchronize

#: Descriptors that a process needs besides its data workers: libraries, sockets, logs.
BASE_DESCRIPTORS = 256

#: Descriptors of one worker in its rank (pipes, sentinel), and of one micro-batch on its way: one for all that is
#: joined, and one for each tensor that a kind of sample adds by itself.
WORKER_DESCRIPTORS, BATCH_DESCRIPTORS = 8, 12

#: Bytes written and read back to measure a disk, and of memory that is checked at most on a CPU.
DISK_BYTES = 64 << 20
MEMORY_BYTES = 256 << 20

#: Longest path of a socket, and what multiprocessing appends to the temporary folder for one, bytes (Linux).
SOCKET_PATH, SOCKET_NAME = 107, len("/pymp-abcdefgh/listener-abcdefgh")

#: Address space below which a rank hardly starts, bytes.
ADDRESS_SPACE = 32 << 30

SHARED_MEMORY = Path("/dev/shm")

#: Shared memory to have for each byte that is needed: other programs have segments there too.
SHARED_SPARE = 1.25


def check_descriptors(workers: int, prefetch: int) -> Finding:
    """Check that `ulimit -n` is enough for what the data workers keep open in their rank."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = BASE_DESCRIPTORS + workers * (WORKER_DESCRIPTORS + prefetch * BATCH_DESCRIPTORS)
    value = f"{limit} open files allowed, about {needed} needed"
    if limit >= needed:
        return Finding("open files", "ok", value)
    fix = f"ulimit -n {max(needed, 65536)}" if hard >= needed else f"the hard limit is {hard}: ask the administrator"
    return Finding("open files", "fail", value, f"{fix}, or lower data.workers or data.prefetch")


def check_temporary_folder(workers: int) -> Finding:
    """Check that the sockets by which data workers hand over tensors can have names below the temporary folder."""
    folder = tempfile.gettempdir()
    value = f"{folder}, {len(os.fsencode(folder))} bytes long"
    if not workers or len(os.fsencode(folder)) + SOCKET_NAME <= SOCKET_PATH:
        return Finding("temporary folder", "ok", value)
    # Found here: a worker that can't make its socket dies without a word, and the rank waits for it.
    advice = f"sockets have names of {SOCKET_PATH} bytes at most: export TMPDIR=/tmp, or data.workers=0"
    return Finding("temporary folder", "fail", value, advice)


def check_address_space() -> Finding:
    """Check `ulimit -v`, which counts what is mapped and not what is used."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return Finding("address space", "ok", "unlimited")
    advice = "torch maps many times what it uses: ulimit -v unlimited"
    return Finding("address space", "fail" if limit < ADDRESS_SPACE else "warn", f"limited to {_gb(limit)}", advice)


def check_shared_memory(workers: int, bytes_each: int, folder: Path = SHARED_MEMORY) -> Finding:
    """Check that the micro-batches that wait on this host find room in shared memory.

    Args:
        workers: data workers of each rank.
        bytes_each: what one more of them takes, on all ranks of this host together.
        folder: shared memory.
    """
    if not workers:
        return Finding("shared memory", "ok", "not used: data.workers=0")
    needed, free = workers * bytes_each, shutil.disk_usage(folder).free
    value = f"{_gb(free)} free in {folder}, {_gb(needed)} needed by {workers} data workers of each rank"
    if free >= needed:
        return Finding("shared memory", "ok", value)
    room, fitting = math.ceil(SHARED_SPARE * needed / 2**30), workers_with_room(bytes_each, folder)
    fewer = f"data.workers={fitting}" if fitting else "lower data.prefetch or batch.micro"
    return Finding("shared memory", "fail", value, f"docker run --shm-size={room}g (or --ipc=host), or {fewer}")


def workers_with_room(bytes_each: int, folder: Path = SHARED_MEMORY) -> int:
    """Count the data workers of each rank whose micro-batches fit into shared memory; arguments as for the check."""
    return int(shutil.disk_usage(folder).free / SHARED_SPARE // max(bytes_each, 1))


def check_disk_space(folder: Path, checkpoint: int, kept: int) -> Finding:
    """Check that the disk of `folder` has room for `kept` checkpoints of `checkpoint` bytes and one being written."""
    free = shutil.disk_usage(_existing(folder)).free
    value = f"{_gb(free)} free, {kept + 1} checkpoints of {_gb(checkpoint)}"
    advice = "make room, lower checkpoint.keep_last, or another run.dir"
    if free < checkpoint:
        return Finding("disk space", "fail", value, advice)
    return Finding("disk space", "ok" if free >= (kept + 1) * checkpoint else "warn", value, advice)


def check_disk_rate(folder: Path, name: str) -> Finding:
    """Write a file into the run folder, durably, and read it back."""
    folder.mkdir(parents=True, exist_ok=True)
    # Random bytes: a file system that compresses would store zeros at a rate that no checkpoint gets.
    path, data = folder / f".doctor_{name}", os.urandom(1 << 20)
    started = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(DISK_BYTES >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - started
        with path.open("rb") as file:
            same = all(file.read(1 << 20) == data for _ in range(DISK_BYTES >> 20))
    finally:
        path.unlink(missing_ok=True)
    if not same:
        return Finding("run folder", "fail", f"{folder}: other bytes came back", "replace the disk, or another run.dir")
    return Finding("run folder", "ok", f"{folder}: {DISK_BYTES / 1e6 / written:.0f} MB/s written")


def check_memory(device: torch.device) -> Finding:
    """Write patterns into most of the free memory of an accelerator (a part of a host's) and read them back."""
    cuda = device.type == "cuda"
    size = int(0.8 * torch.cuda.mem_get_info(device)[0]) if cuda else MEMORY_BYTES
    block = torch.empty(size // 8, dtype=torch.int64, device=device)
    wrong = 0
    for pattern in (0x5555555555555555, -0x5555555555555556):
        block.fill_(pattern)
        synchronize(device)
        # In parts on an accelerator: the mask has a byte a word, which would not fit beside 80 % of the memory.
        wrong += (
            int((block != pattern).sum())
            if not cuda
            else sum(int((part != pattern).sum()) for part in block.split(1 << 26))
        )
    del block
    if cuda:
        torch.cuda.empty_cache()
    advice = "take the host out of the job and have its memory replaced"
    return Finding("memory", "fail" if wrong else "ok", f"{_gb(size)} of {device} checked, {wrong} wrong words", advice)


def check_arithmetic(device: torch.device) -> Finding:
    """Multiply small whole numbers, which is exact in every format, and compare with the product in int64."""
    a = (torch.arange(512 * 512).reshape(512, 512) * 7) % 3 - 1
    b = (torch.arange(512 * 512).reshape(512, 512) * 5) % 7 % 3 - 1
    product = (a.float().to(device) @ b.float().to(device)).cpu()
    same = torch.equal(product.long(), a @ b)
    advice = "take the host out of the job: it computes wrongly"
    return Finding("arithmetic", "ok" if same else "fail", "exact" if same else f"wrong products on {device}", advice)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of matrix products, TFLOP/s."""
    return matmul_tflops(device, dtype)


def _existing(folder: Path) -> Path:
    return folder if folder.exists() or folder == folder.parent else _existing(folder.parent)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
