"""timm must be importable next to a CPU torch, however the first attempt went."""

import subprocess
import sys

import pytest

AFTER = "from pretrain.runtime.vision_ops import ensure_torchvision as e; e(); e(); import timm.layers; print('fine')"


@pytest.mark.parametrize("before", ["", "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"])
def test_timm_can_be_imported(before: str) -> None:
    """In a fresh process: what is already imported there would hide a failure."""
    done = subprocess.run([sys.executable, "-c", before + AFTER], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stderr
