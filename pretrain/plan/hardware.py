"""Accelerators and the rates that a plan counts with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.errors import RecipeError
from pretrain.runtime.untrusted import parse_json

#: Share of the data sheet's rates that large matrix products and copies reach; assumed where nothing was measured.
MATMUL_SHARE, MEMORY_SHARE, LINK_SHARE = 0.68, 0.85, 0.75


@dataclass(frozen=True)
class Gpu:
    """One accelerator among others like it.

    Attributes:
        name: as on the command line.
        memory: bytes.
        peak_tflops: dense bf16 (fp16 where it has no bf16), data sheet, TFLOP/s; what MFU is relative to.
        matmul_tflops: rate of large matrix products, TFLOP/s.
        memory_gbs: rate of reading and writing its memory, GB/s.
        link_gbs: rate to the others of its node, GB/s in one direction.
        network_gbs: its share of the node's network, GB/s in one direction.
        per_node: accelerators of a node.
        measured: whether the rates were measured, or derived from the data sheet.
    """

    name: str
    memory: float
    peak_tflops: float
    matmul_tflops: float
    memory_gbs: float
    link_gbs: float
    network_gbs: float
    per_node: int = 8
    measured: bool = False

    @property
    def launch_s(self) -> float:
        """Least time of a kernel, seconds."""
        return 4e-6 if self.link_gbs else 0.0


def _from_sheet(name: str, memory_gb: float, tflops: float, memory_gbs: float, link: float, network: float) -> Gpu:
    return Gpu(
        name, memory_gb * 1e9, tflops, tflops * MATMUL_SHARE, memory_gbs * MEMORY_SHARE, link * LINK_SHARE,
        network * LINK_SHARE,
    )  # fmt: skip


#: Data sheets: memory GB, dense bf16 TFLOP/s, memory GB/s, link GB/s and network GB/s in one direction.
SHEETS = {
    gpu.name: gpu
    for gpu in (
        _from_sheet("v100", 34.1, 125, 900, 150, 12.5),
        _from_sheet("a100-40", 42.3, 312, 1555, 300, 25),
        _from_sheet("a100", 85.0, 312, 2039, 300, 25),
        _from_sheet("l40s", 48.0, 362, 864, 32, 12.5),
        _from_sheet("h100", 85.0, 989, 3350, 450, 50),
        _from_sheet("h200", 151.0, 989, 4800, 450, 50),
        _from_sheet("b200", 192.0, 2250, 8000, 900, 50),
    )
}
HERE = "here"


def find_gpu(name: str, rates: Path | None = None) -> Gpu:
    """Find the accelerator called `name`, with the rates of a file where one is given.

    Args:
        name: one of `SHEETS`, or `here`: this machine's device, measured now.
        rates: JSON with any of matmul_tflops, memory_gbs, link_gbs, network_gbs (bench/gpu.py writes such a file).

    Raises:
        RecipeError: no such accelerator, or a file that does not say what it should.
    """
    if name == HERE:
        return _measure()
    if name not in SHEETS:
        raise RecipeError(f"--gpu: found {name}; known are {', '.join((*SHEETS, HERE))}")
    return replace(SHEETS[name], measured=True, **_read_rates(rates)) if rates else SHEETS[name]


def _read_rates(path: Path) -> dict[str, Any]:
    allowed = ("matmul_tflops", "memory_gbs", "link_gbs", "network_gbs")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        found = {key: float(content[key]) for key in allowed if key in content}
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"--rates {path}: unreadable ({error}); expected what `bench/gpu.py rates` writes") from error
    if not found:
        raise RecipeError(f"--rates {path}: none of {', '.join(allowed)} in it")
    return found


def _measure() -> Gpu:
    """Measure this machine's device: an accelerator where there is one, else one core."""
    import time

    import torch

    from pretrain.runtime.speed import matmul_tflops, synchronize

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # 2^28 bytes, read and written again: far more than any cache holds, which would answer in place of the memory.
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        # The best of five: whatever else goes on can only make a copy slower.
        best = min(best, time.perf_counter() - started)
    rate = matmul_tflops(device, dtype)
    if device.type == "cpu":
        import psutil

        return Gpu(HERE, psutil.virtual_memory().total, rate, rate, 2**29 / best / 1e9, 0.0, 0.0, 1, measured=True)
    memory = torch.cuda.get_device_properties(device).total_memory
    return Gpu(HERE, memory, rate, rate, 2**29 / best / 1e9, 0.0, 0.0, torch.cuda.device_count(), measured=True)
