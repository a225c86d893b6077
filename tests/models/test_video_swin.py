"""Video Swin: torchvision's with the same weights, at sizes that need padding, cut windows and shifts; its names."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.dropout import DropPath, draw_by_position
from pretrain.models.swin_windows import from_windows, to_windows
from pretrain.models.video_swin import Config, VideoSwin, VideoSwinArchitecture
from pretrain.runtime.vision_ops import ensure_torchvision

SMALL: dict[str, Any] = {"dim": 8, "depths": [2, 2], "heads": [2, 4], "window": (4, 3, 2)}


def architecture(size: tuple[int, int, int] = (32, 224, 224), **config: Any) -> VideoSwinArchitecture:
    return VideoSwinArchitecture(Config(**config), SimpleNamespace(size=size, stride=2))


def torchvision_name(name: str) -> str:
    """Say what torchvision calls a parameter: merging stands beside stages, and an MLP is a sequence."""
    name = re.sub(r"^layers\.(\d+)\.blocks", lambda found: f"features.{2 * int(found[1])}", name)
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"features.{2 * int(found[1]) + 1}", name)
    return name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")


def both(**config: Any) -> tuple[VideoSwin, nn.Module]:
    """Our network and torchvision's, of the same weights, none of them zero."""
    ensure_torchvision()
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    torch.manual_seed(0)
    ours = VideoSwin(Config(**config)).eval()
    for value in ours.parameters():
        nn.init.normal_(value, std=0.3)
    theirs = SwinTransformer3d([2, 4, 4], config["dim"], config["depths"], config["heads"], list(config["window"]))
    state = {torchvision_name(name): value for name, value in ours.state_dict().items()}
    found = theirs.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert {name for name in found.missing_keys if "index" not in name} == {"head.weight", "head.bias"}
    return ours, theirs.eval()


def torchvision_map(model: Any, video: Tensor) -> Tensor:
    found: Tensor = model.norm(model.features(model.patch_embed(video.permute(0, 4, 1, 2, 3))))
    return found.permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize(
    "size",
    [
        (16, 48, 48),  # whole windows, shifted in all directions
        (13, 57, 44),  # padded: to patches, windows, and for the merging
        (8, 72, 41),  # no shift in time: the clip is as long as a window
        (6, 9, 50),  # windows cut in time and height
    ],
)
def test_maps_are_those_of_torchvision(size: tuple[int, int, int]) -> None:
    ours, theirs = both(**SMALL)
    video = torch.randn(2, *size, 3)
    (found,) = ours(video)
    torch.testing.assert_close(found, torchvision_map(theirs, video), rtol=1e-4, atol=1e-5)
    stated = architecture(size, **SMALL).maps()
    assert found.shape[1:3] == (*stated.channels, *stated.times)
    assert found.shape[3:] == tuple(-(-side * stated.scale // 1) for side in size[1:])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_torchvision(recompute: bool) -> None:
    ours, theirs = both(**SMALL)
    ours.activation_checkpointing = recompute
    video = torch.randn(1, 10, 40, 29, 3)
    ours(video)[0].square().mean().backward()
    torchvision_map(theirs, video).square().mean().backward()
    others = dict(theirs.named_parameters())
    for name, value in ours.named_parameters():
        other = others[torchvision_name(name)].grad
        assert other is not None and value.grad is not None and other.abs().max() > 0, name
        torch.testing.assert_close(value.grad, other, rtol=1e-3, atol=1e-5, msg=name)


def test_windows_and_back() -> None:
    x = torch.arange(2 * 4 * 6 * 6.0).view(2, 4, 6, 6, 1)
    cut = to_windows(x, (2, 3, 2))
    assert torch.equal(cut[1, 4].flatten(), x[1, :2, 3:, 2:4].flatten())
    assert torch.equal(from_windows(cut, (2, 3, 2), (4, 6, 6)), x)


def test_the_published_network() -> None:
    """Sizes and work of torchvision's Swin3D-B, less its head of 400 classes; names as in the files."""
    ensure_torchvision()
    from torchvision.models.video.swin_transformer import Swin3D_B_Weights

    published, head = Swin3D_B_Weights.KINETICS400_V1.meta, 1024 * 400
    with torch.device("meta"):
        model = architecture().build()
    assert sum(value.numel() for value in model.parameters()) == published["num_params"] - head - 400
    macs = architecture((16, 224, 224)).cost().published
    assert round((macs + head) / 1e9, 3) == published["_ops"]
    state = model.state_dict()
    assert tuple(state["layers.2.blocks.17.attn.relative_position_bias_table"].shape) == (15 * 13 * 13, 16)
    assert tuple(state["layers.0.downsample.reduction.weight"].shape) == (256, 512)
    assert not any("index" in name for name in state)


def test_a_clip_skips_each_branch_by_itself() -> None:
    model = VideoSwin(Config(**SMALL, drop_path=0.5))
    layers = [layer for layer in model.modules() if isinstance(layer, DropPath)]
    assert [layer.rate for layer in layers] == [0.5 * index / 3 for index in (1, 1, 2, 2, 3, 3)]
    draw_by_position(model).keys = torch.arange(64)
    first, second = (layer(torch.ones(64, 1, 1, 1, 1)).flatten() > 0 for layer in layers[-2:])
    assert 16 < first.sum() < 48 and not torch.equal(first, second)


def test_work_counts_the_padding_of_windows() -> None:
    """5 x 6 x 7 tokens of 8 channels are filled up to 8 x 6 x 8, those of the second stage to 8 x 3 x 4."""
    macs = architecture((10, 24, 28), **SMALL).cost().macs
    assert macs["attention"] == 2 * (384 * (4 * 8**2 + 2 * 24 * 8) + 96 * (4 * 16**2 + 2 * 24 * 16))
    assert macs["merging"] == 5 * 3 * 4 * 32 * 16


def test_layers_count_blocks() -> None:
    model = VideoSwin(Config(**SMALL))
    layers = {name: architecture(**SMALL).layer_of(name) for name, _ in model.named_parameters()}
    assert {last for _, last in layers.values()} == {5}
    assert layers["patch_embed.norm.bias"][0] == 0 and layers["layers.0.blocks.0.norm1.weight"][0] == 1
    assert layers["layers.0.downsample.norm.weight"][0] == 2 and layers["layers.1.blocks.0.mlp.fc1.bias"][0] == 3
    assert layers["layers.1.blocks.1.attn.qkv.bias"][0] == 4 and layers["norm.weight"][0] == 5
    assert architecture(**SMALL).layer_of("head.predictor.cls_score.weight") == (5, 5)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dim": 0}, "model.dim=0, allowed: 1 or more"),
        ({"depths": [2, 0, 18, 2]}, "model.depths=[2, 0, 18, 2], allowed: 1 or more each"),
        ({"depths": [], "heads": []}, "model.depths=[], allowed: 1 or more each"),
        ({"depths": [2, 2]}, "model.heads=[4, 8, 16, 32], allowed: one number for each of model.depths=[2, 2]"),
        ({"heads": [4, 7, 16, 32]}, "model.heads=[4, 7, 16, 32]: 7 do not divide the 256 channels of stage 2"),
        ({"window": (8, 0, 7)}, "model.window=[8, 0, 7], allowed: 1 or more each"),
        ({"drop_path": 1.0}, "model.drop_path=1.0, allowed: a probability from 0 to below 1"),
    ],
)
def test_sizes_that_can_not_be_are_named(wrong: dict[str, Any], told: str) -> None:
    assert told in architecture(**wrong).problems()
    with pytest.raises(RecipeError, match=told.partition("=")[0]):
        VideoSwin(Config(**wrong))
