"""MoCo v3's ViT and ResNet as encoders: first values, what stays frozen, layouts, sizes."""

import math

import pytest
import torch
from torch import Tensor

from pretrain.errors import RecipeError
from pretrain.models import image_vit, moco_vit, picture_resnet
from pretrain.models.base import MapLevel
from pretrain.models.contrastive_heads import contrastive_head
from pretrain.models.moco_vit import MocoViT, grid_code
from pretrain.models.picture_resnet import PictureResNet
from pretrain.models.weights import LoadReport, load_state
from pretrain.runtime.vision_ops import ensure_torchvision
from pretrain.samples import clip

SMALL = moco_vit.Config(image_size=24, patch_size=8, dim=32, depth=2, heads=4, mlp_ratio=3)


def test_code_says_row_then_column() -> None:
    """Token 5 of a grid of 3 lies in row 1, column 2."""
    code = grid_code(3, 8)
    assert code.shape == (1, 10, 8) and not code[0, 0].any()
    wanted = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    wanted += [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    torch.testing.assert_close(code[0, 6], torch.tensor(wanted))


def test_first_values() -> None:
    torch.manual_seed(0)
    model = MocoViT(SMALL)
    limits = {
        "patch_embed.proj.weight": math.sqrt(6 / (3 * 64 + 32)),
        "blocks.0.attn.qkv.weight": math.sqrt(6 / (32 + 32)),
        "blocks.1.attn.proj.weight": math.sqrt(6 / (32 + 32)),
        # As large as the joint projection, and not drawn like it.
        "blocks.1.mlp.fc1.weight": math.sqrt(6 / (96 + 32)),
    }
    for name, limit in limits.items():
        assert 0.95 * limit < float(model.get_parameter(name).detach().abs().max()) <= limit, name
    assert not any(value.any() for name, value in model.named_parameters() if name.endswith(".bias"))
    assert 0 < float(model.cls_token.detach().abs().max()) < 1e-5
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    learning = moco_vit.Config(**(vars(SMALL) | {"freeze_patches": False}))
    assert [name for name, value in MocoViT(learning).named_parameters() if not value.requires_grad] == ["pos_embed"]


def test_image_vit_takes_its_weights_over() -> None:
    model = MocoViT(SMALL)
    plain = image_vit.Config(image_size=24, patch_size=8, dim=32, depth=2, heads=4, mlp_ratio=3, classes=0)
    other = image_vit.ImageViT(plain)
    load_state(other, model.state_dict(), LoadReport("moco", "own"))
    pictures = torch.randn(2, 1, 24, 24, 3)
    torch.testing.assert_close(model(pictures), other(pictures))


def test_what_can_not_be_built_is_refused() -> None:
    square = clip.Config(frames=1, height=24, width=24)
    odd = moco_vit.Config(**(vars(SMALL) | {"dim": 30, "heads": 5}))
    assert any("model.dim=30: no multiple of 4" in line for line in moco_vit.ARCHITECTURE(odd, square).problems())
    assert moco_vit.ARCHITECTURE(SMALL, square).problems() == []
    for wrong, expected in (
        (picture_resnet.Config(layers=18), "allowed: 50, 101"),
        (picture_resnet.Config(classes=-1), "model.classes"),
    ):
        with pytest.raises(RecipeError, match=expected):
            PictureResNet(wrong)


def test_published_sizes() -> None:
    with torch.device("meta"):
        vit = MocoViT(moco_vit.Config())
        resnet = PictureResNet(picture_resnet.Config())
    assert sum(value.numel() for value in vit.parameters()) == 21_665_664
    assert sum(value.numel() for value in resnet.parameters()) == 25_557_032


def disturbed(model: torch.nn.Module) -> None:
    """Biases, scales and running statistics that are not 0 and 1, as trained networks have them."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and value.dim() == 1:
                value.add_(torch.rand_like(value) * (0.5 if name.endswith("var") else 0.2))


def test_resnet_is_torchvisions() -> None:
    ensure_torchvision()
    from torchvision.models import resnet50

    torch.manual_seed(1)
    theirs = resnet50(num_classes=3).eval()
    disturbed(theirs)
    model = PictureResNet(picture_resnet.Config(classes=3)).eval()
    renamed = model.from_official(theirs.state_dict())
    load_state(model, renamed.state, LoadReport("torchvision", renamed.layout))
    pictures = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), theirs(pictures), rtol=1e-4, atol=1e-5)
        first, second = (model(one[None]) for one in pictures)
        frames: Tensor = pictures.permute(0, 2, 3, 1)[None]
        torch.testing.assert_close(model(frames), (first + second) / 2, rtol=1e-4, atol=1e-5)
        maps = model.forward_maps(pictures)
    state = model.official_file()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    architecture = picture_resnet.ARCHITECTURE(picture_resnet.Config(), clip.Config(frames=1, height=64, width=64))
    assert architecture.maps()[0] == MapLevel(256, 4) and architecture.maps()[3] == MapLevel(2048, 32)
    assert [one.shape[1:] for one in maps] == [(256, 12, 18), (512, 6, 9), (1024, 3, 5), (2048, 2, 3)]
    assert architecture.cost().executed == pytest.approx(4.09e9 * (64 / 224) ** 2, rel=0.01)


def test_resnet_without_a_head_takes_an_encoder() -> None:
    options = picture_resnet.Config(width=8, blocks=[1, 1, 1, 1], classes=0)
    model, other = PictureResNet(options), PictureResNet(options)
    disturbed(model)
    renamed = other.from_official(model.to_official())
    load_state(other, renamed.state, LoadReport("own", renamed.layout), renamed.may_miss, renamed.may_ignore)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    features, every = model.eval()(torch.ones(1, 3, 64, 64)), model.forward_features(torch.ones(1, 3, 64, 64), False)
    assert features.shape == (1, 256) and every.shape == (1, 4, 256)
    torch.testing.assert_close(every.mean(1), features)


def test_heads_are_named_as_released() -> None:
    assert list(contrastive_head([5, 7, 7, 3]).state_dict()) == [
        *("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),
        *("3.weight", "4.weight", "4.bias", "4.running_mean", "4.running_var", "4.num_batches_tracked"),
        *("6.weight", "7.running_mean", "7.running_var", "7.num_batches_tracked"),
    ]
    assert [*contrastive_head([5, 7, 3], last_norm=False).state_dict()][-1] == "3.weight"
