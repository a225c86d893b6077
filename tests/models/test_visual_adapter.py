"""The image tower for open_clip: plain CLIP with the teacher in it, a student's answers, tokens and regions."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.errors import RecipeError
from pretrain.models.clip import Config as ClipConfig
from pretrain.models.clip import VisualTower
from pretrain.models.clip_weights import our_names
from pretrain.models.sparseformer.sparseformer_config import Config
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.visual_adapter import VisualAdapter
from pretrain.runtime.vision_ops import ensure_torchvision

CLIP = ClipConfig(
    size="custom", image_size=32, patch_size=16, dim=128, depth=2, heads=2, embedding=12, text_dim=32, text_depth=1,
    text_heads=2, activation="quick_gelu", context=8, vocabulary=50,
)  # fmt: skip
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def open_clip_model() -> Any:
    ensure_torchvision()
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 16, "head_width": 64}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(12, vision, text, quick_gelu=True).eval()


def student(**other: Any) -> SparseFormer:
    torch.manual_seed(1)
    sizes = {"tokens": 5, "focus_dim": 64, "dim": 128, "depth": 1, "repeats": 2, "points": 4, "channels": 8}
    return SparseFormer(
        Config(size="custom", form="bootstrapped", head_bias=False, **{"classes": 12, **sizes, **other})
    ).eval()


def test_plain_clip_with_the_teacher_plugged_in() -> None:
    model, images = open_clip_model(), torch.randn(3, 3, 32, 32)
    ids = torch.tensor([[48, 3, 49, 0, 0, 0, 0, 0], [48, 7, 8, 9, 49, 0, 0, 0]])
    tower = VisualTower(CLIP).eval()
    own = our_names({name: value.clone() for name, value in model.state_dict().items()})
    tower.load_state_dict(
        {name.removeprefix("visual."): one for name, one in own.items() if name.startswith("visual.")}
    )
    with torch.no_grad():
        wanted = model(images, ids)
        model.visual.output_tokens = True
        pooled, tokens = model.visual(images)
        model.visual = VisualAdapter(tower, 32)
        for found, one in zip(model(images, ids), wanted, strict=True):
            torch.testing.assert_close(found, one, **CLOSE)
        model.visual.output_tokens = True
        for found, one in zip(model.visual(images), (pooled, tokens), strict=True):
            torch.testing.assert_close(found, one, **CLOSE)
        sight = model.visual.look(images)
        assert sight.regions is None and sight.tokens.shape == (3, 5, 128)
    assert model.visual.output_dim == 12 and model.visual.image_size == (32, 32)


def test_a_student_in_the_tower_s_place() -> None:
    import open_clip

    model, images = open_clip_model(), torch.randn(3, 3, 32, 32)
    net = student()
    model.visual = VisualAdapter(net, 24)
    with torch.no_grad():
        found = model.encode_image(images, normalize=True)
        wanted = torch.nn.functional.normalize(net(images), dim=-1)
        torch.testing.assert_close(found, wanted, **CLOSE)
        sight = model.visual.look(images)
        torch.testing.assert_close(sight.embedding, net(images), **CLOSE)
        torch.testing.assert_close(sight.tokens, net.forward_features(images, pooled=False), **CLOSE)
        torch.testing.assert_close(sight.regions, net.encode(images)[1], **CLOSE)
        assert sight.regions.shape == (3, 5, 4) and sight.tokens.shape == (3, 6, 128)
    assert open_clip.model.get_model_preprocess_cfg(model)["size"] == (24, 24)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    assert model.visual.transforms()(picture).shape == (3, 24, 24)
    model.set_grad_checkpointing(True)
    assert net.activation_checkpointing is True
    model.lock_image_tower()
    assert not any(value.requires_grad for value in model.visual.parameters())
    with pytest.raises(RecipeError, match="unlocked_groups=1"):
        model.lock_image_tower(unlocked_groups=1)


def test_without_a_head_there_is_no_embedding() -> None:
    with pytest.raises(RecipeError, match="model.classes=0"):
        VisualAdapter(student(classes=0), 24)
