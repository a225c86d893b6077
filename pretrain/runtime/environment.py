"""environment.json: what a run ran on, enough to explain a difference later."""

import functools
import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "deepspeed",
    "webdataset",
    "decord",
    "av",
    "torchcodec",
    "timm",
    "wandb",
    "omegaconf",
    "fsspec",
    "numpy",
)

#: Packages that a run consists of.
CODE = ("pretrain", "finetune")

#: Variables that change speed or behaviour. Nothing else is stored: environments hold keys and tokens.
VARIABLES = re.compile(r"(SLURM_JOB_|SLURM_N|NCCL_|GLOO_|DS_|OMP_|CUDA_|TORCH_|PYTORCH_|TUBELET_|MASTER_|WORLD_SIZE$)")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


def environment_report() -> dict[str, Any]:
    """Report versions, commit, host, devices, and the environment variables that matter, without secrets."""
    return {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "commit": commit(),
        "packages": versions(),
        "devices": _devices(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            # The prefixes admit whole families of names: a user's own TUBELET_..._TOKEN would fit as well.
            if VARIABLES.match(name) and not _SECRET.search(name)
        },
    }


@functools.cache  # each takes reading a file of thousands of lines, and a checkpoint is written with them
def versions() -> dict[str, str]:
    """List installed versions of the packages that make results."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_hash() -> str:
    """Hash the program's own files: a checkout on one host may be older, or edited, without another version."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for package in CODE for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """Return the checkout's commit, `+` appended where files differ from it; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=root, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["cpu"]
    return [
        f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB"
        for index in range(torch.cuda.device_count())
    ]
