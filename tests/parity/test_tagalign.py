"""Official TagAlign: CLIP surgery, both projectors, both losses with gradients, masks of free-text classes."""

import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from finetune.open_vocabulary.text_masks import blended_masks
from pretrain.models import clip
from pretrain.models.clip_surgery import SurgeryTower
from pretrain.models.clip_weights import load_clip
from pretrain.models.patch_projector import Config, PatchProjector, from_official, load_projector, to_official
from pretrain.objectives.contrast import LogitScale, both_directions, normalized
from pretrain.objectives.tagalign import tag_losses
from pretrain.runtime.process_group import Ranks

KINDS = ("tagalign",)
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
OFFICIAL = {"GDecoder": "gated_conv", "Transformer": "transformer"}


def weights_of(case: Any, part: str) -> dict[str, Tensor]:
    return {k.removeprefix(part): v for k, v in load_file(case.weights).items() if k.startswith(part)}


def towers(case: Any) -> tuple[clip.Config, SurgeryTower, clip.TextTower, str]:
    given = case.meta["config"]
    config = clip.Config(
        size="custom", image_size=given["img"], patch_size=given["patch"], dim=given["width"], depth=given["layers"],
        heads=given["heads"], embedding=given["out"], text_dim=given["twidth"], text_depth=given["tlayers"],
        text_heads=given["theads"], activation="quick_gelu", context=given["ctx"], vocabulary=given["vocab"],
    )  # fmt: skip
    images, texts, raw = SurgeryTower(config), clip.TextTower(config), weights_of(case, "clip:")
    load_clip(images.tower, "golden", raw=raw)
    load_clip(texts, "golden", raw=raw)
    return config, images.eval(), texts.eval(), "golden"


def check(case: Any, found: dict[str, Tensor]) -> None:
    """Compare at the tolerance of meta.json: atol 3e-5, rtol 1e-4, gradients rtol 1e-3."""
    stated = re.fullmatch(r"atol (\S+), rtol (\S+); gradients rtol (\S+)", case.meta["tolerance"])
    assert stated
    tensors = case.tensors()
    for name, value in found.items():
        rtol = float(stated[3] if "_grad_" in name else stated[2])
        torch.testing.assert_close(value.detach(), tensors[name], atol=float(stated[1]), rtol=rtol)


def test_surgery_and_texts(case: Any) -> None:
    _, images, texts, _ = towers(case)
    tensors = case.tensors()
    with torch.no_grad():
        found = {"clip_image_feats": images(tensors["image"]), "text_emb": texts(tensors["text"])}
        classes = torch.stack([texts(tokens).mean(0) for tokens in tensors["eval_class_tokens"]])
    check(case, found | {"eval_text_embedding": classes})
    alone = images(tensors["image"], class_token=False)
    assert torch.equal(alone, found["clip_image_feats"][:, 1:])


@pytest.mark.parametrize("official", OFFICIAL)
def test_projector_and_losses(case: Any, official: str) -> None:
    config, images, _, _ = towers(case)
    given, tensors, raw = case.meta["config"], case.tensors(), weights_of(case, f"{official}:")
    model = PatchProjector(Config(
        kind=OFFICIAL[official], units=given["n_layers"], kernel=given["kernel"], heads=given["blk_heads"], clip=config
    ))  # fmt: skip
    load_projector(model, "golden", raw)
    scales = {}
    for name in ("cl_loss", "ce_loss"):
        scales[name] = LogitScale()
        with torch.no_grad():
            scales[name].logit_scale.fill_(raw[f"{name}.logit_scale"])
    with torch.no_grad():
        patches = images(tensors["image"], class_token=False)
    found, grid = {}, images.grid(*tensors["image"].shape[2:])
    projected = model(patches, grid)
    pooled = projected.mean(1)
    embedded = normalized(pooled, 1e-6)
    sides = both_directions(embedded, normalized(tensors["text_emb"], 1e-6), scales["cl_loss"](), ALONE)
    contrast = (sides[0].mean() + sides[1].mean()) / 2
    labels = [row.nonzero().flatten() for row in tensors["tag"]]
    tags = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1)
    table = F.normalize(load_file(case.weights)["label_embedding"], dim=-1)
    each = tag_losses(embedded @ table.t() * scales["ce_loss"](), tags)
    assert not each[1] and not len(labels[1]), "the second picture has no tag"
    maps = projected.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)
    found = {
        f"{official}_patch_feats": maps if official == "GDecoder" else projected,
        f"{official}_image_feat": pooled,
        f"{official}_cl_loss": contrast,
        f"{official}_ce_loss": each.mean(),
    }
    (contrast + each.mean()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert all(one is not None for one in gradients.values())
    there = to_official(gradients)
    there |= {f"{name}.logit_scale": one.logit_scale.grad.reshape(()) for name, one in scales.items()}
    wanted = [name for name in tensors if name.startswith(f"{official}_grad_")]
    assert len(wanted) > 4
    found |= {name: there[name.removeprefix(f"{official}_grad_")] for name in wanted}
    check(case, found)


@pytest.mark.parametrize("official", OFFICIAL)
def test_masks_of_texts(case: Any, official: str) -> None:
    config, images, _, _ = towers(case)
    given, tensors = case.meta["config"], case.tensors()
    model = PatchProjector(Config(
        kind=OFFICIAL[official], units=given["n_layers"], kernel=given["kernel"], heads=given["blk_heads"], clip=config
    ))  # fmt: skip
    load_projector(model, "golden", weights_of(case, f"{official}:"))
    classes = normalized(tensors["eval_text_embedding"], 1e-6)
    for blend in (0.0, 0.3):
        masks = blended_masks(images, model, tensors["eval_image"], classes, blend)
        check(case, {f"{official}_masks_clipw{blend}": masks})


def test_names_go_both_ways(case: Any) -> None:
    for official in OFFICIAL:
        raw = {k: v for k, v in weights_of(case, f"{official}:").items() if k.startswith("projector.")}
        again = to_official(from_official(raw))
        assert again.keys() == raw.keys()
        assert all(torch.equal(again[key], raw[key]) for key in raw)
