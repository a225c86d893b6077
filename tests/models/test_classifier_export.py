"""A classifier for transformers: it loads there with equal logits, and comes back."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pretrain.errors import WeightsError
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.classifier_export import export_huggingface
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.formats import export_official
from pretrain.models.keep_rates import Reorganisation
from pretrain.runtime.vision_ops import ensure_torchvision

SIZES = {"size": "custom", "patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.0, "classes": 3}


def build(seed: int = 0, width: int = 16, **options) -> VideoClassifier:
    torch.manual_seed(seed)
    model = VideoClassifier(Config(**({**SIZES, "positions": "rebuild"} | options)), 4, 16, width)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    return model.eval()


def clips() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, 3, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pooling", ["mean", "token0"])
def test_transformers_gives_equal_logits(pooling: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5")
    ensure_torchvision()
    from transformers import VideoMAEForVideoClassification

    model = build(pooling=pooling)
    export_huggingface(model, str(tmp_path), ["run", "jump", "sit"])
    other = VideoMAEForVideoClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = other(clips().permute(0, 1, 4, 2, 3)).logits
    assert_close(logits, model(clips()).detach(), rtol=1e-4, atol=1e-4)
    assert other.config.id2label == {0: "run", 1: "jump", 2: "sit"}


@pytest.mark.parametrize("pooling", ["mean", "token0"])
def test_round_trip(pooling: str, tmp_path: Path) -> None:
    source = build(pooling=pooling)
    export_huggingface(source, str(tmp_path / "folder"))
    export_official(source, str(tmp_path / "official.pth"))
    for name in ("folder", "official.pth"):
        model = build(1, pooling=pooling)
        report = load_pretrained(model, str(tmp_path / name))
        assert not report.missing and not report.unexpected
        assert torch.equal(model(clips()), source(clips()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cosine_attention": True}, "cosine"),
        ({"layer_scale": 0.1}, "layer scale"),
        ({"head": "batch_norm"}, "batch norm"),
        ({"tokens": Reorganisation(0.5)}, "reorganisation"),
        ({"positions": "interpolate"}, "stretched"),
        ({"classes": 0}, "no head"),
        ({"width": 24}, "not square"),
    ],
)
def test_what_transformers_lacks_is_refused(options: dict, text: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=text):
        export_huggingface(build(**copy.deepcopy(options)), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_labels_must_fit(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="2 labels for 3 classes"):
        export_huggingface(build(), str(tmp_path), ["one", "two"])
