"""TSM: what its shift does, and weights under the names of other code."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.tsm import ARCHITECTURE, TSM, Config, shifted
from pretrain.samples import augmented_clip, segments


def build(**options: Any) -> TSM:
    torch.manual_seed(0)
    return TSM(Config(width=8, blocks=[1, 2, 1, 1], classes=5, **options), 4).eval()


def clips() -> Tensor:
    return torch.randn(2, 4, 32, 32, 3, generator=torch.Generator().manual_seed(1))


def test_published_sizes() -> None:
    """torchvision's ResNet-50 with another head; TSM's paper: 33 GMACs for 8 frames, 65 for 16."""
    architecture = ARCHITECTURE(Config(), segments.Config(window=1))
    assert architecture.problems() == [] and architecture.cost().published == pytest.approx(8 * 4.0872e9, rel=1e-3)
    with torch.device("meta"):
        count = sum(value.numel() for value in architecture.build().parameters())
    assert count == 25_557_032 - 1000 * 2049 + 174 * 2049


def test_a_shift_brings_neighbours() -> None:
    x = torch.arange(1.0, 4 * 16 + 1).view(4, 16, 1, 1)
    found, series = shifted(x, 4, 8)[:, :, 0, 0], x[:, :, 0, 0]
    assert found[:, :2].tolist() == [*series[1:, :2].tolist(), [0, 0]], "from the segment after"
    assert found[:, 2:4].tolist() == [[0, 0], *series[:-1, 2:4].tolist()], "from the segment before"
    assert_close(found[:, 4:], series[:, 4:])


@torch.no_grad()
def test_order_matters_through_the_shift_alone() -> None:
    video, shifting, plain = clips(), build(), build(shift_divisor=0)
    assert float((shifting(video.flip(1)) - shifting(video)).abs().max()) > 1e-6
    assert_close(plain(video.flip(1)), plain(video))
    assert_close(shifting(video)[1:], shifting(video[1:]), msg="clips are not mixed")


def pictures(model: TSM) -> dict[str, Tensor]:
    """The weights under torchvision's names, without a head."""
    named = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stages":
            named[f"layer{int(parts[1]) + 1}." + ".".join(parts[2:])] = value
        elif parts[0] == "stem":
            named[name.replace("stem.conv", "conv1").replace("stem.bn", "bn1")] = value
    return {name: value for name, value in named.items() if "num_batches" not in name}


def test_weights_of_three_layouts_come_in() -> None:
    theirs = build()
    official = theirs.to_official()
    assert {"backbone.conv1.conv.weight", "backbone.conv1.bn.running_var", "backbone.layer2.1.conv1.conv.net.weight",
            "backbone.layer2.0.conv3.bn.weight", "backbone.layer1.0.downsample.conv.weight",
            "backbone.layer4.0.downsample.bn.bias", "cls_head.fc_cls.bias"} <= set(official)  # fmt: skip
    torchvision = pictures(theirs)
    own = {
        f"base_model.{name.replace('.conv1.weight', '.conv1.net.weight')}": value for name, value in torchvision.items()
    }
    own |= {name: value for name, value in zip(("new_fc.weight", "new_fc.bias"), theirs.head.parameters(), strict=True)}
    own |= {f"base_model.{name}": value for name, value in batches(theirs).items()}
    files = {"MMAction2": official, "TSM": own, "torchvision ResNet": torchvision | {"fc.weight": torch.zeros(9, 256)}}
    for layout, state in files.items():
        ours = build()
        with torch.no_grad():
            for value in [*ours.parameters(), *(one for name, one in ours.named_buffers() if "num" not in name)]:
                value.fill_(0.5)
            ours.head.load_state_dict(theirs.head.state_dict())
        raw = {f"module.{name}": value for name, value in state.items()}
        report = load_pretrained(ours, "tsm.pth", raw=raw)  # type: ignore[arg-type]
        assert report.layout == layout and report.unexpected == (["fc.weight"] if "fc.weight" in state else [])
        with torch.no_grad():
            assert_close(ours(clips()), theirs(clips()), rtol=0, atol=0)


def batches(model: TSM) -> dict[str, Tensor]:
    found = {name: value for name, value in model.state_dict().items() if "num_batches" in name}
    return {
        name.replace("stem.bn", "bn1") if name.startswith("stem") else
        f"layer{int(name.split('.')[1]) + 1}." + ".".join(name.split(".")[2:]): value
        for name, value in found.items()
    }  # fmt: skip


def test_files_are_taken_whole_or_not() -> None:
    official = build().to_official()
    lacking = {name: value for name, value in official.items() if "layer3.0.conv2.conv" not in name}
    with pytest.raises(WeightsError, match="missing: stages.2.0.conv2.weight"):
        load_pretrained(build(), "tsm.pth", raw=lacking)  # type: ignore[arg-type]
    twice = official | {"backbone.layer1.0.conv1.weight": official["backbone.layer1.0.conv1.conv.net.weight"]}
    with pytest.raises(WeightsError, match="a second tensor for stages.0.0.conv1.weight"):
        load_pretrained(build(), "tsm.pth", raw=twice)  # type: ignore[arg-type]


def test_what_cannot_be_built() -> None:
    for options, told in (({"shift_divisor": 1}, "allowed: 2 or more"), ({"dropout": 1.0}, "model.dropout"),
                          ({"blocks": [1]}, "four numbers"), ({"width": 0}, "model.width=0")):  # fmt: skip
        with pytest.raises(RecipeError, match=told):
            TSM(Config(**options), 8)  # type: ignore[arg-type]
    assert "input.window=5, allowed with model.name=tsm: 1" in ARCHITECTURE(Config(), segments.Config()).problems()[0]
    assert ARCHITECTURE(Config(), augmented_clip.Config()).problems() == []
