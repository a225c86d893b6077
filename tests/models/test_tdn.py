"""TDN: published sizes, what each module does alone, and weights of other files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.tdn import (
    ARCHITECTURE,
    TDN,
    Config,
    DifferenceBottleneck,
    LongTermDifference,
    TemporalConvolution,
)
from pretrain.samples import augmented_clip, segments

SMALL = Config(width=8, blocks=[1, 1, 2, 1], classes=5)


def build(segments: int = 4, **options: Any) -> TDN:
    torch.manual_seed(0)
    model = TDN(replace(SMALL, **options), segments)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def clips(count: int = 2, frames: int = 20) -> Tensor:
    return torch.randn(count, frames, 40, 40, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("depth", "count", "macs"),
    [(50, 24_420_046, {8: 35.64, 16: 71.28}), (101, 43_681_726, {16: 131.68})],
)
def test_published_sizes(depth: int, count: int, macs: dict[int, float]) -> None:
    """systems/tdn.md section 3.4, with the 9,472 parameters of the released code's unused stem."""
    for number, giga in macs.items():
        architecture = ARCHITECTURE(Config(depth=depth), segments.Config(segments=number))
        assert architecture.problems() == [] and round(architecture.cost().published / 1e9, 2) == giga
    with torch.device("meta"):
        assert sum(value.numel() for value in architecture.build().parameters()) + 9_472 == count


@torch.no_grad()
def test_a_picture_and_its_neighbours_are_seen() -> None:
    model, video = build(), clips()
    plain = model(video)
    swapped = video.clone()
    swapped[:, 0::5], swapped[:, 4::5] = video[:, 4::5], video[:, 0::5]
    assert float((model(swapped) - plain).abs().max()) > 1e-6
    alone = build(short_term=False)
    other = video.clone()
    other[:, [0, 1, 3, 4]] += 1
    assert_close(alone(other), alone(video), rtol=0, atol=0)
    middles = build(short_term=False, window=1)
    assert_close(middles(video[:, 2::5]), alone(video), rtol=0, atol=0)


@torch.no_grad()
def test_a_long_term_module_whose_last_norm_is_zero_changes_nothing() -> None:
    module = LongTermDifference(32, 4).eval()
    x = torch.randn(8, 32, 6, 6)
    assert float((module(x) - x).abs().max()) > 1e-4
    module.expand_bn.weight.zero_()
    assert_close(module(x), x, rtol=0, atol=0)
    module.expand_bn.bias.fill_(100)
    assert_close(module(x), 1.5 * x, msg="the gate ends at a half")


@torch.no_grad()
def test_a_temporal_convolution_begins_as_a_shift() -> None:
    x = torch.randn(2, 4, 16, 3, 3)
    expected = x.clone()
    expected[:, :, :2], expected[:, :, 2:4] = 0, 0
    expected[:, :-1, :2], expected[:, 1:, 2:4] = x[:, 1:, :2], x[:, :-1, 2:4]
    assert_close(TemporalConvolution(16, 4)(x.flatten(0, 1)), expected.flatten(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("left", ["short_term", "long_term", "temporal"])
def test_each_module_can_be_left_out(left: str) -> None:
    model = build(**{left: False})
    assert not any(left in name for name, _ in model.named_parameters())
    for other in {"short_term", "long_term", "temporal"} - {left}:
        assert any(other in name for name, _ in model.named_parameters())
    model.train()(clips()).sum().backward()
    assert all(value.grad is not None for value in model.parameters()), "no parameter without a gradient"


def test_shares_of_the_two_paths() -> None:
    assert [build(number).picture_share for number in (4, 8, 16)] == [0.75, 0.5, 0.75]
    assert build(8, picture_share=0.9).picture_share == 0.9


def test_dropout_is_of_each_segment() -> None:
    model = build(dropout=0.5)
    features = model.forward_features(clips(), pooled=False)
    assert features.shape == (2, 4, 256)
    assert_close(features.mean(1), model.forward_features(clips()))
    assert_close(model.forward_head(features), model.forward_head(features.mean(1)))
    torch.manual_seed(0)
    kept = F.dropout(torch.ones(2, 4, 256), 0.5)
    torch.manual_seed(0)
    assert_close(model.train().forward_head(features), model.head(features * kept).mean(1))


def test_recomputation_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = TDN(replace(SMALL, dropout=0.0), 4, recompute).train()
        model(clips()).square().sum().backward()
        found.append([value.grad for value in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_clips_of_another_length_are_refused() -> None:
    with pytest.raises(RecipeError, match="clips of 40 frames, and this model was built for 4 segments x 5"):
        build()(clips(1, 40))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"depth": 34}, "model.depth=34, allowed: 50, 101"),
        ({"blocks": [1, 1]}, "allowed: four numbers"),
        ({"window": 1}, "allowed with model.short_term=true: 5"),
        ({"window": 4, "short_term": False}, "an odd number"),
        ({"width": 12}, "no multiple of 8"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"picture_share": 0.0}, "model.picture_share=0.0"),
        ({"classes": 0}, "model.classes=0"),
    ],
)
def test_configurations_that_cannot_be_built(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        TDN(Config(**options), 8)


def test_inputs_that_do_not_fit() -> None:
    found = ARCHITECTURE(Config(), augmented_clip.Config(frames=40)).problems()
    assert found == ["input.name: found augmented_clip; tdn sees segments, set input.name=segments"]
    assert "input.window=1, and model.window=5" in ARCHITECTURE(Config(), segments.Config(window=1)).problems()[0]
    small = segments.Config(height=32, width=64)
    assert "found 32, allowed with model.long_term: from 33" in ARCHITECTURE(Config(), small).problems()[0]
    assert ARCHITECTURE(Config(long_term=False), small).problems() == []


def test_layers_are_numbered_by_block() -> None:
    architecture = ARCHITECTURE(Config(), segments.Config())
    names = ("stem.conv.weight", "short_term.stage.2.conv1.weight", "stages.0.0.conv1.weight",
             "stages.2.1.long_term.squeeze.weight", "stages.3.2.conv3.bias", "head.weight")  # fmt: skip
    assert [architecture.layer_of(name) for name in names] == [(n, 17) for n in (0, 0, 1, 9, 16, 17)]


def pictures(width: int = 8) -> dict[str, Tensor]:
    """torchvision's names of a small ResNet, without biases, as its files have them."""
    state = {"conv1.weight": torch.randn(width, 3, 7, 7), "fc.weight": torch.randn(9, 256), "fc.bias": torch.randn(9)}
    named = {name.removeprefix("stem."): value for name, value in build(4).state_dict().items()}
    for name, value in named.items():
        if name.startswith("bn."):
            state[f"bn1.{name.removeprefix('bn.')}"] = torch.rand_like(value.float())
        elif name.startswith("stages."):
            stage, rest = name.removeprefix("stages.").split(".", 1)
            foreign = ("long_term", "temporal", "num_batches")
            if not any(word in rest for word in foreign) and not (
                rest.endswith("bias") and ("conv" in rest or "downsample.0" in rest)
            ):
                state[f"layer{int(stage) + 1}.{rest}"] = torch.rand_like(value)
    return {name: value for name, value in state.items() if "num_batches" not in name}


def test_a_network_for_pictures_is_taken_twice(tmp_path: Path) -> None:
    state, model = pictures(), build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "resnet.pth")
    report = load_pretrained(model, str(tmp_path / "resnet.pth"))  # type: ignore[arg-type]
    assert report.layout == "torchvision ResNet" and report.unexpected == ["fc.weight", "fc.bias"]
    after = model.state_dict()
    assert_close(after["stages.2.1.conv2.weight"], state["layer3.1.conv2.weight"])
    assert_close(after["short_term.stage.0.bn3.running_var"], state["layer1.0.bn3.running_var"])
    first = after["short_term.stem.conv.weight"]
    assert first.shape == (8, 12, 7, 7), "the mean over colours, for each channel of the differences"
    assert_close(first[:, 7], state["conv1.weight"].mean(1))
    for name in ("stages.1.0.conv1.bias", "short_term.stem.bn.weight", "stages.1.0.long_term.squeeze.weight"):
        assert_close(after[name], before[name], msg=f"{name} keeps its first value")
    incomplete = {name: value for name, value in state.items() if name != "layer4.0.bn1.weight"}
    with pytest.raises(WeightsError, match="missing: stages.3.0.bn1.weight"):
        load_pretrained(model, "resnet.pth", raw=incomplete)  # type: ignore[arg-type]


def released(model: TDN) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in model.to_official().items()}


def test_released_checkpoints_come_in(tmp_path: Path) -> None:
    theirs, ours = build(), build()
    with torch.no_grad():
        for value in ours.parameters():
            value.zero_()
    optimizer = torch.optim.SGD(ours.parameters(), 0.01)
    # A warm-up's state holds the schedule behind it as an object, and that its optimiser.
    warm_up = {"after_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 45])}
    content = {"epoch": 60, "arch": "resnet50", "state_dict": released(theirs), "scheduler": warm_up, "prec1": 64.0}
    torch.save(content, tmp_path / "best.pth.tar")
    report = load_pretrained(ours, str(tmp_path / "best.pth.tar"))  # type: ignore[arg-type]
    assert report.layout == "released TDN" and len(report.unexpected) == 2, "the unused stem"
    with torch.no_grad():
        assert_close(ours(clips()), theirs(clips()), rtol=0, atol=0)
    # With dropout 0 the released code calls its classifier otherwise.
    other = {name.replace("new_fc", "base_model.fc"): value for name, value in released(theirs).items()}
    load_pretrained(ours, "best.pth.tar", raw=other)  # type: ignore[arg-type]


def test_released_checkpoints_are_taken_whole_or_not() -> None:
    state = released(build())
    lacking = {name: value for name, value in state.items() if "layer4_bak.0.mse.bn3.weight" not in name}
    with pytest.raises(WeightsError, match="missing: stages.3.0.long_term.expand_bn.weight"):
        load_pretrained(build(), "best.pth.tar", raw=lacking)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="unexpected: stages.1.0.long_term"):
        load_pretrained(build(long_term=False), "best.pth.tar", raw=state)  # type: ignore[arg-type]
    twice = state | {"module.base_model.fc.weight": state["module.new_fc.weight"]}
    with pytest.raises(WeightsError, match="a second tensor for head.weight"):
        load_pretrained(build(), "best.pth.tar", raw=twice)  # type: ignore[arg-type]


def test_a_head_of_other_classes_is_left_out() -> None:
    other = build(classes=7)
    report = load_pretrained(other, "k400.pth.tar", raw=released(build()))  # type: ignore[arg-type]
    assert report.missing == ["head.weight", "head.bias"]


@torch.no_grad()
def test_initialisation() -> None:
    torch.manual_seed(0)
    model = TDN(Config(), 8)
    assert float(model.head.weight.std()) == pytest.approx(0.001, rel=0.05) and not model.head.bias.any()
    block: Any = model.stages[1][0]  # type: ignore[index]
    assert isinstance(block, DifferenceBottleneck) and block.long_term is not None
    assert float(block.long_term.expand.weight.std()) == pytest.approx((2 / 128) ** 0.5, rel=0.1)
    assert float(block.long_term.coarse.weight.std()) == pytest.approx((2 / (9 * 8)) ** 0.5, rel=0.1)
    assert block.conv1.bias.any(), "as torch begins it"
