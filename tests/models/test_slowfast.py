"""The two-pathway backbone: its frames, sizes, names and frozen norms."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.errors import RecipeError
from pretrain.models.slowfast import Config, FrozenNorm, SlowFast, SlowFastArchitecture, split_pathways

SMALL: dict[str, Any] = {"depth": 50, "width": 8, "beta": 4}


def architecture(size: tuple[int, int, int] = (64, 256, 256), **config: Any) -> SlowFastArchitecture:
    return SlowFastArchitecture(Config(**config), SimpleNamespace(size=size, stride=1))


def test_the_pathways_frames() -> None:
    video = torch.arange(64.0).view(1, 64, 1, 1, 1).expand(2, -1, 1, 1, 3)
    slow, fast = split_pathways(video, Config())
    assert slow[1, :, 0, 0, 0].tolist() == [3, 11, 19, 27, 35, 43, 51, 59]
    assert fast[0, :, 0, 0, 0].tolist() == list(range(0, 64, 2))
    slow, _ = split_pathways(video, Config(), torch.tensor([0, 7]))
    assert slow[:, 0, 0, 0, 0].tolist() == [0, 7] and slow[:, -1, 0, 0, 0].tolist() == [56, 63]


@pytest.mark.parametrize("recompute", [False, True])
def test_maps_have_the_stated_sizes_and_all_weights_a_gradient(recompute: bool) -> None:
    torch.manual_seed(0)
    model, stated = SlowFast(Config(**SMALL), recompute), architecture((16, 64, 96), **SMALL).maps()
    maps = model(torch.randn(1, 16, 64, 96, 3))
    assert [tuple(one.shape) for one in maps] == [
        (1, channels, times, 4, 6) for channels, times in zip(stated.channels, stated.times, strict=True)
    ]
    sum((one.square().mean() for one in maps), torch.zeros(())).backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.parameters())


def test_the_published_network() -> None:
    """62.8 million weights with Kinetics-400's classifier of 0.9; names as in the files."""
    with torch.device("meta"):
        model = architecture().build()
    assert round(sum(value.numel() for value in model.parameters()) / 1e6, 1) == 61.8
    state = model.state_dict()
    assert tuple(state["slow.res_nl4.res_2.btnk.conv1.conv.weight"].shape) == (512, 2048, 3, 1, 1)
    assert tuple(state["slow.res_nl3.res_0.shortcut.conv.weight"].shape) == (1024, 512 + 128, 1, 1, 1)
    assert tuple(state["fast.Tconv4.conv.weight"].shape) == (256, 128, 5, 1, 1)
    assert {name.rpartition(".")[2] for name in state if ".bn" in name} == {
        "weight", "bias", "running_mean", "running_var",
    }  # fmt: skip


def test_frozen_norms_are_batch_norms_that_do_not_learn() -> None:
    frozen, norm = FrozenNorm(3), nn.BatchNorm3d(3).eval()
    for value in (*norm.parameters(), *norm.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.5, 2)
    frozen.load_state_dict({name: value for name, value in norm.state_dict().items() if "num" not in name})
    x = torch.randn(2, 3, 2, 4, 4)
    assert torch.allclose(frozen.train()(x), norm(x), atol=1e-6)
    assert not list(frozen.parameters())
    before = frozen.running_mean.clone()
    frozen(x)
    assert torch.equal(frozen.running_mean, before)


def test_cost_is_what_convolutions_multiply() -> None:
    """The lateral connections of 32 x 32 frames: at maps of 7, 7, 4 and 2 pixels' side, of 2 frames."""
    macs = architecture((16, 32, 32), **SMALL).cost().macs
    sides, widths = (7, 7, 4, 2), (2, 8, 16, 32)
    assert macs["lateral connections"] == sum(2 * s * s * 5 * w * 2 * w for s, w in zip(sides, widths, strict=True))
    assert macs["slow pathway"] > macs["fast pathway"] > 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"depth": 34}, "model.depth=34, allowed: 50, 101"),
        ({"alpha": 3}, "model.tau=8: no multiple of model.alpha=3"),
        ({"width": 60}, "model.width=60: no multiple of model.beta=8"),
        ({"beta": 0}, "model.beta=0, allowed: 1 or more"),
        ({"tau": 6, "alpha": 2}, "input.frames=64: no multiple of model.tau=6"),
    ],
)
def test_sizes_that_can_not_be_are_named(wrong: dict[str, Any], told: str) -> None:
    assert told in architecture(**wrong).problems()
    if "frames" not in told:
        with pytest.raises(RecipeError, match=told.partition("=")[0]):
            SlowFast(Config(**wrong))
