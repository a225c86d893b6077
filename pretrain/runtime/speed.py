"""Rates of a device, for model FLOP utilisation (MFU)."""

import time

import torch

#: Square matrices of this size are multiplied; smaller on the CPU, where they take long enough.
SIZE = {"cpu": 1024, "accelerator": 8192}
SECONDS = 0.3


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of large matrix products on `device` in `dtype`, TFLOP/s: what MFU is relative to.

    The best of repeated products within about 0.3 s after a warm-up, with the threads that torch is set to.
    """
    size = SIZE["cpu" if device.type == "cpu" else "accelerator"]
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS or best == float("inf"):
        # The best, not the mean: other work on the machine makes a product slower, never faster.
        best = min(best, _timed_product(a, b))
    return 2 * size**3 / best / 1e12


def _timed_product(a: torch.Tensor, b: torch.Tensor) -> float:
    synchronize(a.device)
    started = time.perf_counter()
    torch.mm(a, b)
    synchronize(a.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory in use so far: of the accelerator, or resident of this process on the CPU, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
