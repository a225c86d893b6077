"""Hugging Face VideoMAE classification: its weights give its logits in our model, at its epsilons and at ours."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from pretrain.errors import WeightsError
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.classifier_weights import load_pretrained

KINDS = ("videomae_hf_classification",)
PROJECTION = "videomae.embeddings.patch_embeddings.projection.weight"


def empty(case, norm_eps: float, fc_norm_eps: float) -> VideoClassifier:
    """The model of the case, with random weights."""
    config, names = case.meta["config"], load_file(case.weights)
    image = config["img"]
    height, width = image if isinstance(image, list) else (image, image)
    return VideoClassifier(
        Config(
            size="custom",
            patch_size=config["p"],
            tubelet=names[PROJECTION].shape[2],
            dim=config["ed"],
            depth=config["edp"],
            heads=config["eh"],
            mlp_ratio=config["mlp"],
            classes=config["nc"],
            pooling="mean" if "fc_norm.weight" in names else "token0",
            norm_eps=norm_eps,
            fc_norm_eps=fc_norm_eps,
            positions="rebuild",
        ),
        case.tensors()["video"].shape[2],
        height,
        width,
    ).eval()


@torch.no_grad()
def logits(case, path: str, norm_eps: float, fc_norm_eps: float) -> torch.Tensor:
    model = empty(case, norm_eps, fc_norm_eps)
    report = load_pretrained(model, path)
    assert report.layout == "Hugging Face" and not report.missing and not report.unexpected
    return model(case.tensors()["video"].movedim(1, -1))


def test_at_its_own_epsilons(case) -> None:
    assert_close(logits(case, case.weights, 1e-12, 1e-5), case.tensors()["hf_logits"], **case.tolerance("outputs"))


def test_at_official_epsilons(case) -> None:
    found, tensors, near = logits(case, case.weights, 1e-6, 1e-6), case.tensors(), case.tolerance("outputs")
    assert_close(found, tensors["hf_logits_eps1e6"], **near)
    assert_close(found, tensors["official_logits"], **near)


def test_other_spelling_of_biases(case, tmp_path) -> None:
    """transformers 5 writes query.bias for q_bias; reading it must give the same logits, losing it must fail."""
    state = load_file(case.weights)
    old_to_new = {"attention.attention.q_bias": "attention.attention.query.bias",
                  "attention.attention.v_bias": "attention.attention.value.bias"}  # fmt: skip
    for old, new in old_to_new.items():
        state = {key.replace(old, "<>").replace(new, old).replace("<>", new): value for key, value in state.items()}
    save_file(state, tmp_path / "other.safetensors")
    found = logits(case, str(tmp_path / "other.safetensors"), 1e-6, 1e-6)
    assert_close(found, case.tensors()["official_logits"], **case.tolerance("outputs"))
    lost = {key: value for key, value in state.items() if not key.endswith(("query.bias", "attention.q_bias"))}
    save_file(lost, tmp_path / "lost.safetensors")
    with pytest.raises(WeightsError, match="q_bias"):
        logits(case, str(tmp_path / "lost.safetensors"), 1e-6, 1e-6)
