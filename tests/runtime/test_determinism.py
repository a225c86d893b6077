"""Kernels are chosen for the same bits: always on a CPU, on an accelerator where it is asked for."""

import os

import pytest
import torch

from pretrain.runtime.determinism import compute_alike


@pytest.mark.parametrize(
    ("kind", "asked", "alike"), [("cpu", False, True), ("cuda", False, False), ("cuda", True, True)]
)
def test_what_is_set(kind: str, asked: bool, alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    try:
        compute_alike(torch.device(kind), asked)
        assert torch.are_deterministic_algorithms_enabled() is alike
        assert torch.backends.cuda.flash_sdp_enabled(), "the back end that stays"
        assert torch.backends.cuda.mem_efficient_sdp_enabled() is not alike
        assert torch.backends.cuda.cudnn_sdp_enabled() is not alike
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is alike
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.use_deterministic_algorithms(before)
