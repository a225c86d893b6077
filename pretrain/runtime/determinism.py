"""Arithmetic that gives the same bits whenever it is done again on the same hardware."""

import os

import torch


def compute_alike(device: torch.device, asked: bool) -> None:
    """Have torch choose kernels that add up in one order: always on a CPU, on an accelerator where it is asked for.

    Else nothing is changed: whoever calls `train` may have asked for more.

    Some kernels add up in any order unless told not to, and a resumed run would not be the same bit for bit. On an
    accelerator the others are slower, and there may be none for an operation of one's own: torch names it then.

    Args:
        device: of this rank.
        asked: compute.deterministic of the recipe.
    """
    if not asked and device.type != "cpu":
        return
    torch.use_deterministic_algorithms(True)
    # Tried out by time otherwise, and another start may find another one faster.
    torch.backends.cudnn.benchmark = False
    # One back end: which of them serves a shape may follow from versions, alignment and free memory.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    # Read when cuBLAS makes its first handle; without it torch refuses its products in this mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
