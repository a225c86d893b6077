"""Every kind of classifier as a graph: any number of clips, equal logits in torch.export and onnxruntime."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from finetune.adapters.attach import apply_tuning
from finetune.adapters.config import Prompts, Tune
from finetune.classification.graphs import PixelsToLogits, onnx_difference, trace, write_onnx
from pretrain.errors import WeightsError
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.image_vit import Config as PictureModel
from pretrain.models.image_vit import ImageViT
from pretrain.models.keep_rates import Reorganisation
from pretrain.models.sparseformer import Config as SparseModel
from pretrain.models.sparseformer.sparseformer_model import SparseFormer

SIZES: dict[str, Any] = {
    "size": "custom", "patch_size": 8, "dim": 24, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "classes": 3,
    "drop_path": 0.1, "positions": "rebuild",
}  # fmt: skip


def build(tune: Tune | None = None, **options: Any) -> VideoClassifier:
    torch.manual_seed(0)
    model = VideoClassifier(Config(**(SIZES | options)), 4, 16, 16)
    if tune is not None:
        apply_tuning(model, tune)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def clips(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    "options",
    [
        {"tune": Tune("lora"), "cosine_attention": True, "layer_scale": 0.1},
        {"tune": Tune("adaptformer"), "head": "batch_norm", "pooling": "token0"},
        {"tune": Tune("vpt", vpt=Prompts(tokens=2))},
        {"tokens": Reorganisation(0.5, size_weighted=True)},
        {"tokens": Reorganisation(0.5, per_frame=True, fuse=False)},
    ],
    ids=["lora-cosine", "adaptformer-batch_norm", "prompts", "fewer tokens", "fewer tokens a frame"],
)
def test_any_number_of_clips(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = build(**options)
    program = trace(model, 4, 16, 16)
    for count in (1, 2, 7):
        with torch.no_grad():
            assert_close(program.module()(clips(count)), PixelsToLogits(model)(clips(count)), rtol=1e-5, atol=1e-6)
    assert write_onnx(program, str(tmp_path / "model.onnx"), {"classes": ["a"]}) < 1e-4


def test_any_number_of_pictures() -> None:
    model = ImageViT(PictureModel("image_vit", 16, 8, 24, 2, 3, 2.0, classes=5, tokens=Reorganisation(0.5))).eval()
    program = trace(model, 1, 16, 16).module()
    for count in (1, 3):
        pictures = clips(count)[:, :1]
        with torch.no_grad():
            assert_close(program(pictures), PixelsToLogits(model)(pictures), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"video": True, "replicates": 2}, {"form": "bootstrapped"}])
def test_any_number_for_a_sparseformer(options: dict[str, Any]) -> None:
    sizes = {"size": "custom", "form": "v1", "tokens": 5, "focus_dim": 64, "dim": 128, "depth": 1, "repeats": 2,
             "points": 9, "channels": 8, "classes": 3}  # fmt: skip
    model = SparseFormer(SparseModel(**{**sizes, **options})).eval()
    frames = 4 if "video" in options else 1
    program = trace(model, frames, 16, 16).module()
    for count in (1, 3):
        with torch.no_grad():
            found = program(clips(count)[:, :frames])
            assert_close(found, PixelsToLogits(model)(clips(count)[:, :frames]), rtol=1e-5, atol=1e-5)


def test_a_wrong_graph_is_noticed(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    one, other = trace(build(), 4, 16, 16), trace(build(pooling="token0"), 4, 16, 16)
    write_onnx(one, str(tmp_path / "model.onnx"), {})
    with pytest.raises(WeightsError, match="gives other logits"):
        onnx_difference(other, tmp_path / "model.onnx")
