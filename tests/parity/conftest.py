"""Finds parity cases: every meta.json below the folder that TUBELET_GOLDENS names (default: tests/goldens).

A test module states which kinds it covers in `KINDS`; its tests that take `case` run once for each case of these kinds.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

GOLDENS = Path(os.environ.get("TUBELET_GOLDENS") or Path(__file__).parents[1] / "goldens")

#: What the `system` entry of a meta.json starts with, and the kind that it means, for what is built so far.
SYSTEMS = {
    "VideoMAE V1 pre-training": "videomae_v1_pretrain",
    "VideoMAE V2 dual-masking pre-training": "videomae_v2_pretrain",
    "Hugging Face VideoMAEForPreTraining": "videomae_hf_pretrain",
    "VideoMAE V2 frame and crop index rules": "videomae_sampling",
    "VideoMAE V2 classification model": "videomae_v2_finetune",
    "Hugging Face VideoMAEForVideoClassification": "videomae_hf_classification",
    "AdaptFormer": "adaptformer",
    "EViT": "evit",
    "VideoMAE action detection baseline": "videomae_ava",
    "AVA frame-mAP": "ava_map",
    "frame-mAP and video-mAP": "video_map",
    "EVAD": "evad",
    "CycleACR head": "cycleacr",
    "CycleACR on a VideoMAE ViT": "cycleacr_videomae",
    "MGSampler": "mgsampler",
    "SparseFormer v1 image, ImageNet training code": "sparseformer",
    "SparseFormer v1 image, library code": "sparseformer_lib",
    "SparseFormer v1 video": "sparseformer_video",
    "Bootstrapped SparseFormer": "sparseformer_bootstrap",
    "GroupMixFormer": "groupmixformer",
    "TDN": "tdn",
    "SNCLR": "snclr",
    "TVTSv2": "tvtsv2",
    "TagAlign": "tagalign",
}

NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"


@pytest.fixture(autouse=True)
def as_the_goldens_were_made() -> Iterator[None]:
    """One thread and float32 products in full, whatever a run inside an earlier test has set for the process.

    Tolerances are a few roundings wide, and sums in another order take part of them.
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True)
class Case:
    """One folder with meta.json and the tensors beside it."""

    folder: Path
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.folder.relative_to(GOLDENS))

    @property
    def system(self) -> str:
        return str(self.meta.get("system") or self.meta.get("what") or "unnamed")

    @property
    def kind(self) -> str | None:
        """Kind of a case that can be run, or None."""
        found = next((kind for start, kind in SYSTEMS.items() if self.system.startswith(start)), None)
        if found == "evit" and "dims" not in self.meta:
            return "evit_schedule"
        if found == "tdn" and "dims" not in self.meta:
            return "tdn_frames"
        cosine = found == "videomae_v2_pretrain" and "cosine attention" in self.system
        return f"{found}_cosattn" if cosine else found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Inputs and outputs."""
        return safetensors.torch.load_file(self.folder / "io.safetensors")

    @property
    def weights(self) -> str:
        return str(self.folder / "weights.safetensors")

    def tolerance(self, quantity: str) -> dict[str, float]:
        """rtol and atol that the meta file states for `outputs` or `gradients`."""
        text = str(self.meta["tolerance"])
        both = re.search(rf"abs {NUMBER} / rel {NUMBER}", text)
        if both:
            return {"atol": float(both[1]), "rtol": float(both[2])}
        found = re.search(rf"{quantity}[^:;]*:\s*rtol {NUMBER}, atol {NUMBER}", text)
        assert found, f"{self.name}: no tolerance for {quantity} in {text!r}"
        return {"rtol": float(found[1]), "atol": float(found[2])}


@pytest.fixture
def built_kinds() -> set[str]:
    """Every kind that the finder recognises."""
    return {*SYSTEMS.values(), "videomae_v2_pretrain_cosattn", "evit_schedule", "tdn_frames"}


def find_cases() -> list[Case]:
    """Every case below the folder, in a fixed order."""
    return [Case(path.parent, json.loads(path.read_text())) for path in sorted(GOLDENS.rglob("meta.json"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = getattr(metafunc.module, "KINDS", ())
    if "case" in metafunc.fixturenames:
        cases = [case for case in find_cases() if case.kind in kinds]
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])
    if "unbuilt_case" in metafunc.fixturenames:
        cases = [case for case in find_cases() if case.kind is None]
        metafunc.parametrize("unbuilt_case", cases, ids=[case.name for case in cases])
