"""A ViT's blocks in a SparseFormer: the same bits, the same places, from every layout; and what has no place there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.errors import WeightsError
from pretrain.models.clip import Config as ClipConfig
from pretrain.models.clip import VisualTower
from pretrain.models.clip_weights import open_clip_names
from pretrain.models.sparseformer.inheritance import PARTS, inherit, inheriting_places, load_inherited
from pretrain.models.sparseformer.sparseformer_config import Config
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.runtime.vision_ops import ensure_torchvision

STUDENT = {"size": "custom", "form": "bootstrapped", "tokens": 5, "focus_dim": 64, "dim": 128, "depth": 2,
           "repeats": 2, "points": 4, "channels": 8, "classes": 5}  # fmt: skip
SIZES = {"embed_dim": 128, "depth": 3, "num_heads": 2, "img_size": 32, "num_classes": 5}
CLIP = ClipConfig(
    size="custom", image_size=32, patch_size=16, dim=128, depth=3, heads=2, embedding=5, text_dim=32, text_depth=1,
    text_heads=2, activation="quick_gelu", context=8, vocabulary=20,
)  # fmt: skip


def stirred(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.eval()


def vit(name: str = "vit_base_patch16_224", **other: Any) -> Any:
    ensure_torchvision()
    import timm

    torch.manual_seed(0)
    return stirred(timm.create_model(name, pretrained=False, **{**SIZES, **other}))


def student(**other: Any) -> SparseFormer:
    torch.manual_seed(2)
    return SparseFormer(Config(**{**STUDENT, **other}))


def whole(state: dict[str, Tensor], depth: int = 3) -> dict[str, Tensor]:
    """What the last two blocks, norm and head of a teacher must have become."""
    found = {f"layers.{3 + j - depth + 2}.{part}{kind}": state[f"blocks.{j}.{part}{kind}"]
             for j in range(depth - 2, depth) for part in PARTS for kind in ("weight", "bias")}  # fmt: skip
    return found | {name: value for name, value in state.items() if name.startswith(("norm.", "head."))}


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit_base_patch16_224", "vit_base_patch16_clip_224"])
def test_inherited_blocks_have_the_teachers_bits(name: str) -> None:
    teacher, model = vit(name).state_dict(), student()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_inherited(model, "teacher.pth", teacher)
    after, expected = model.state_dict(), whole(teacher)
    assert len(expected) == 2 * 12 + 4
    for key, value in after.items():
        assert torch.equal(value, expected.get(key, before[key])), key


def clip_files(tower: VisualTower) -> dict[str, dict[str, Tensor]]:
    """The tower as three libraries write it."""
    own = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    found: dict[str, dict[str, Tensor]] = {"own": own, "open_clip": open_clip_names(own)}
    face: dict[str, Tensor] = {
        "vision_model.embeddings.class_embedding": own["visual.embed.class_token"],
        "vision_model.post_layernorm.weight": own["visual.norm.weight"],
        "vision_model.post_layernorm.bias": own["visual.norm.bias"],
        "visual_projection.weight": own["visual.head.weight"],
    }
    names = {"norm1.": "layer_norm1.", "norm2.": "layer_norm2.", "attn.proj.": "self_attn.out_proj.", "mlp.": "mlp."}
    for key, value in own.items():
        if not key.startswith("visual.blocks."):
            continue
        number, part = key.removeprefix("visual.blocks.").split(".", 1)
        front = f"vision_model.encoder.layers.{number}."
        if part.startswith("attn.qkv."):
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                face[f"{front}self_attn.{letter}_proj.{part.removeprefix('attn.qkv.')}"] = third
        else:
            old = next(old for old in names if part.startswith(old))
            face[front + names[old] + part.removeprefix(old)] = value
    return found | {"Hugging Face": face}


def test_clip_towers_of_all_layouts_are_inherited_alike() -> None:
    """open_clip's projection is turned, which a square one would not show."""
    tower = stirred(VisualTower(CLIP))
    for name, raw in clip_files(tower).items():
        model = student(head_bias=False, activation="quick_gelu")
        load_inherited(model, name, raw)
        after = model.state_dict()
        for key, value in whole(tower.state_dict()).items():
            assert torch.equal(after[key], value), f"{name}: {key}"
        assert after["head.weight"].shape == (5, 128)


def test_units_answer_as_the_blocks_do() -> None:
    """On the same tokens, with the teacher's epsilon; also where LayerScale is folded, and with register tokens."""
    for name in ("vit_base_patch16_224", "vit_small_patch14_reg4_dinov2", "deit3_base_patch16_224"):
        teacher = vit(name, img_size=28 if "dino" in name else 32)
        model = student(norm_eps=1e-6).eval()
        load_inherited(model, name, teacher.state_dict())
        tokens, regions = torch.randn(2, 6, 128), torch.zeros(2, 5, 4)
        maps = torch.zeros(2, 8, 4, 4)
        with torch.no_grad():
            wanted = teacher.blocks[2](teacher.blocks[1](tokens))
            found = model.layers[4](model.layers[3](tokens, regions, maps)[0], regions, maps)[0]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model.head(model.norm(found)), teacher.head(teacher.norm(wanted)))


def test_free_forms_inherit_where_units_have_both_branches() -> None:
    """Every third unit looks, all have attention and MLP: a ViT's blocks, all of them."""
    looks, plain = "sample attend mlp move code", "attend mlp"
    config = {"focus_dim": 128, "repeats": 1, "units": [looks, plain, plain, looks], "depth": None, "classes": 0}
    model = student(**config)
    assert inheriting_places(model.config) == [0, 1, 2, 3]
    teacher = vit(depth=4, num_classes=0).state_dict()
    load_inherited(model, "teacher.pth", teacher)
    assert torch.equal(model.layers[3].mlp.fc1.weight, teacher["blocks.3.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("name", "other", "why"),
    [
        ("vit_base_patch16_224", {"qk_norm": True}, "qk-norm"),
        ("vit_base_patch16_siglip_224", {}, "pools by attention"),
        ("vit_base_patch16_224", {"global_pool": "avg", "class_token": False}, "of the mean"),
        ("vit_base_patch16_224", {"depth": 1}, "has 1 blocks, the student takes over 2"),
        ("vit_base_patch16_224", {"embed_dim": 64}, "mismatched"),
        ("vit_base_patch16_224", {"num_classes": 0}, "missing: head.weight"),
        ("vit_base_patch16_224", {"qkv_bias": False}, "missing: layers.3.attn.qkv.bias"),
        ("deit_base_distilled_patch16_224", {}, "second class token"),
        ("eva02_tiny_patch14_224", {"num_heads": 2, "img_size": 28}, r"apart there|gated MLP|rotated"),
        ("resnet18", None, "no CLIP|no ViT"),
    ],
)
def test_what_has_no_place_is_refused(name: str, other: dict[str, Any] | None, why: str) -> None:
    ensure_torchvision()
    import timm

    teacher = vit(name, **other) if other is not None else timm.create_model(name, pretrained=False)
    model = student()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=why):
        load_inherited(model, "teacher.pth", teacher.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "half loaded"


def test_a_bias_is_left_only_where_it_is_zero() -> None:
    state = vit("vit_base_patch16_clip_224").state_dict()
    model = student(head_bias=False)
    with pytest.raises(WeightsError, match="unexpected: head.bias"):
        load_inherited(model, "teacher.pth", state)
    load_inherited(model, "teacher.pth", {**state, "head.bias": torch.zeros(5)})


def test_unknown_parts_of_blocks_are_refused() -> None:
    state = {**vit().state_dict(), "blocks.2.attn.sink": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"blocks.2.attn.sink: nothing of a SparseFormer"):
        inherit(state, Config(**STUDENT))


def test_a_headless_student_leaves_the_head() -> None:
    found = inherit(vit().state_dict(), Config(**{**STUDENT, "classes": 0}))
    assert {"head.weight", "head.bias", "patch_embed.proj.weight", "blocks.0.norm1.weight"} <= set(found.left)
    assert found.places == {1: 3, 2: 4}
