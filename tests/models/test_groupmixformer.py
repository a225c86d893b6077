"""GroupMixFormer: published sizes and work, maps of any picture, batch norm's three ways, and files of weights."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.cubes import Grid
from pretrain.models.dropout import DropPath, draw_by_position
from pretrain.models.groupmixformer import Config, GroupMixFormer, GroupMixFormerArchitecture
from pretrain.models.groupmixformer_weights import config_of
from pretrain.models.weight_files import read_raw

#: Size: parameters, GMAC at 224 pixels (systems/groupmixformer.md section 3).
PUBLISHED = {
    "mobile": (5_733_120, 1.35),
    "tiny": (10_949_152, 3.72),
    "small": (22_421_320, 5.16),
    "base": (45_827_272, 17.55),
    "large": (71_833_648, 38.25),
}
SMALL: dict[str, Any] = {"size": "custom", "dims": [20, 30, 40, 50], "depths": [1, 2, 1, 1], "mlp_ratios": [2, 2, 3, 4],
                         "classes": 5, "drop_path": 0.0}  # fmt: skip


def architecture(clip: tuple[int, int, int] = (1, 224, 224), **config: Any) -> GroupMixFormerArchitecture:
    return GroupMixFormerArchitecture(Config(**config), SimpleNamespace(size=clip))


def small(**changes: Any) -> GroupMixFormer:
    torch.manual_seed(0)
    return GroupMixFormer(Config(**SMALL | changes))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    parameters, gmacs = PUBLISHED[size]
    with torch.device("meta"):
        model = architecture(size=size).build()
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert architecture(size=size).cost().published / 1e9 == pytest.approx(gmacs, abs=0.005)
    assert config_of(model.state_dict()) == Config(size=size)  # type: ignore[arg-type]


def test_published_work_at_384_pixels() -> None:
    assert architecture((1, 384, 384), size="large").cost().published / 1e9 == pytest.approx(112.4, abs=0.05)


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), (256, 320), (47, 33), (1, 1)], ids=["224", "256x320", "odd", "one pixel"]
)
def test_maps_of_any_picture(height: int, width: int) -> None:
    """Sizes are rounded up, and what the architecture says of maps and tokens holds."""
    model, stated = small().eval(), architecture(**SMALL)
    pictures = torch.randn(2, 1, height, width, 3)
    with torch.no_grad():
        maps, tokens = model.forward_maps(pictures), model.forward_features(pictures, pooled=False)
        assert torch.equal(maps[0], model.forward_maps(pictures[:, 0].permute(0, 3, 1, 2))[0])
    for found, level in zip(maps, stated.maps(), strict=True):
        assert found.shape == (2, level.channels, -(-height // level.stride), -(-width // level.stride))
    grid = stated.token_grid(1, height, width)
    assert grid == Grid(1, *maps[-1].shape[2:]) and tokens.shape == (2, grid.tokens, 50)


def test_the_head_turns_features_into_logits() -> None:
    model, clips = small().eval(), torch.randn(2, 1, 64, 32, 3)
    logits = model.forward_head(model.forward_features(clips))
    assert logits.shape == (2, 5) and torch.equal(logits, model(clips))
    with pytest.raises(RecipeError, match="clips of 2 frames: groupmixformer takes single pictures"):
        model(torch.randn(2, 2, 64, 32, 3))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def step(model: GroupMixFormer) -> dict[str, Tensor]:
    """Gradients of one step in training mode."""
    model.train()(torch.randn(3, 1, 24, 40, 3, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_recomputation_changes_neither_gradients_nor_statistics() -> None:
    """The backward pass computes each block again; its rows would be counted twice."""
    plain, again = small(), small()
    again.activation_checkpointing = True
    expected, found = step(plain), step(again)
    assert found.keys() == expected.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert all(torch.equal(one, statistics(plain)[name]) for name, one in statistics(again).items())
    assert all(part.track_running_stats for part in again.modules() if isinstance(part, nn.BatchNorm2d))


def test_frozen_statistics_stay_and_are_used() -> None:
    model = small(batch_norm="frozen")
    before = statistics(model)
    step(model)
    assert all(torch.equal(one, before[name]) for name, one in statistics(model).items())
    clips = torch.randn(2, 1, 32, 32, 3)
    assert torch.equal(model.train()(clips), model.eval()(clips))
    assert not torch.equal(small().train()(clips), model(clips))


def test_folded_norms_answer_alike() -> None:
    """With statistics of trained networks; the export's graph has no batch norm behind a convolution left."""
    model = small().eval()
    generator = torch.Generator().manual_seed(2)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight, part.bias, part.running_mean, part.running_var):
                assert value is not None
                value.data.copy_(torch.rand(value.shape, generator=generator) + 0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded, clips = architecture(**SMALL).for_inference(model), torch.randn(2, 1, 40, 56, 3)
    with torch.no_grad():
        torch.testing.assert_close(folded(clips), model(clips), rtol=1e-4, atol=1e-5)
    left = [name for name, part in folded.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert {name.rpartition(".")[2] for name in left} == {"norm0", "norm4"} and len(left) == 5 + 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_group_norms_see_one_picture_alone() -> None:
    """No answer depends on other pictures or on former ones, and there is nothing to average over ranks or to fold."""
    model, stated = small(norm="group").train(), architecture(**SMALL, norm="group")
    assert dict(model.named_buffers()) == {} and stated.cross_rank_batch_norm is None
    sizes = {part.num_channels // part.num_groups for part in model.modules() if isinstance(part, nn.GroupNorm)}
    assert sizes == {4, 6, 8, 10}  # of 4, 6, 8 and 10 channels of segments, and of 10, 20, 30, 40 and 50
    clips = torch.randn(3, 1, 24, 40, 3)
    torch.testing.assert_close(model(clips)[1], model(clips[1:2])[0], rtol=1e-4, atol=1e-5)
    assert step(model).keys() == dict(model.named_parameters()).keys()
    assert stated.cost().published > architecture(**SMALL).cost().published
    for theirs, ours in (("batch", "group"), ("group", "batch")):
        with pytest.raises(WeightsError, match=f"have {theirs} norms.* set model.norm={theirs}"):
            architecture(**SMALL, norm=ours).own_weights(small(norm=theirs).state_dict())


@pytest.mark.parametrize(("way", "crosses"), [("all_ranks", True), ("rank", False), ("frozen", None)])
def test_a_recipe_asks_for_batch_norm_over_ranks(way: str, crosses: bool) -> None:
    assert architecture(**SMALL, batch_norm=way).cross_rank_batch_norm is crosses


def test_a_picture_skips_each_branch_by_itself() -> None:
    model = small(drop_path=0.4)
    layers = [layer for layer in model.modules() if isinstance(layer, DropPath)]
    assert [layer.rate for layer in layers] == [pytest.approx(0.4 * index / 4) for index in (1, 1, 2, 2, 3, 3, 4, 4)]
    draw_by_position(model).keys = torch.arange(64)
    first, second = (layer(torch.ones(64, 1, 1)).flatten() > 0 for layer in layers[-2:])
    assert 16 < first.sum() < 60 and not torch.equal(first, second)


def test_layers_count_blocks() -> None:
    layers = {name: architecture(**SMALL).layer_of(name) for name, _ in small().named_parameters()}
    assert {last for _, last in layers.values()} == {6}
    assert layers["conv_stem.proj1.bias"][0] == layers["patch_embed_layers.0.norm.bias"][0] == 0
    assert layers["groupmixformer_backbone.0.gma_stage.0.norm1.bias"][0] == 1
    assert layers["patch_embed_layers.1.norm.bias"][0] == 1 and layers["patch_embed_layers.2.norm.bias"][0] == 3
    assert layers["groupmixformer_backbone.1.gma_stage.1.cpe.proj.bias"][0] == 3
    assert layers["norm4.bias"][0] == layers["head.bias"][0] == 6


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dims": None}, "model.dims: needs a value, since model.size=custom has none"),
        ({"dims": [20, 30, 40]}, "model.dims=[20, 30, 40], allowed: 4 numbers above 0, one for each stage"),
        ({"depths": [1, 0, 1, 1]}, "model.depths=[1, 0, 1, 1], allowed: 4 numbers above 0, one for each stage"),
        ({"mlp_ratios": [1, -1, 1, 1]}, "model.mlp_ratios=[1, -1, 1, 1], allowed: 4 numbers above 0"),
        ({"dims": [20, 35, 40, 50]}, "model.dims=[20, 35, 40, 50]: 35 is no multiple of 10 (5 segments, 8 heads"),
        ({"drop_path": 1.0}, "model.drop_path=1.0: a probability from 0 to below 1 is needed"),
        ({"classes": -1}, "model.classes=-1: 0 (no head) or more is needed"),
    ],
)
def test_sizes_that_can_not_be_are_named(wrong: dict[str, Any], told: str) -> None:
    (found,) = architecture(**SMALL | wrong).problems()
    assert found.startswith(told)
    with pytest.raises(RecipeError):
        small(**wrong)


def test_clips_of_several_frames_are_no_input() -> None:
    assert architecture((4, 64, 64), **SMALL).problems() == [
        "input.frames=4: groupmixformer takes single pictures; set input.frames=1"
    ]


def saved(path: Any, state: dict[str, Tensor], **beside: Any) -> str:
    torch.save({"model": state, **beside}, path)
    return str(path)


def test_a_released_file_starts_a_model(tmp_path: Any) -> None:
    """Official names and container; another number of classes leaves the head out."""
    theirs = small()
    step(theirs)  # statistics that are not the first ones
    ours = small(classes=7)
    report = load_pretrained(ours, saved(tmp_path / "released.pth", theirs.state_dict()))
    assert report.missing == ["head.weight", "head.bias"] and not report.unexpected
    state = theirs.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in ours.state_dict().items() if "head" not in name)


def test_a_file_of_another_size_says_how_to_build_it(tmp_path: Any) -> None:
    saved_state = read_raw(saved(tmp_path / "large.pth", small(depths=[1, 1, 2, 1]).state_dict()))
    with pytest.raises(WeightsError, match=r"set model.dims=\[20,30,40,50\] model.depths=\[1,1,2,1\] model.mlp_r"):
        GroupMixFormerArchitecture(small().options, None).own_weights(saved_state)
    with pytest.raises(WeightsError, match="no GroupMixFormer: weights of 0 stages"):
        config_of({"head.weight": torch.zeros(2, 2)})


def test_a_file_of_the_official_trainer_is_read_without_its_configuration(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `config` is an object of yacs, of which nothing is run; other objects are refused as ever."""
    module = ModuleType("yacs.config")
    for name in ("CfgNode", "Other"):
        made = type(name, (dict,), {"__module__": "yacs.config"})
        setattr(module, name, made)
    monkeypatch.setitem(sys.modules, "yacs", ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    inner = module.CfgNode(TYPE="groupmixformer")
    inner.__dict__["__deprecated_keys__"] = {"OLD"}
    paths = {name: saved(tmp_path / f"{name}.pth", {"w": torch.ones(2)}, epoch=3, config=getattr(module, name)(A=inner))
             for name in ("CfgNode", "Other")}  # fmt: skip
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert torch.equal(read_raw(paths["CfgNode"])["w"], torch.ones(2))
    with pytest.raises(WeightsError, match="yacs.config.Other"):
        read_raw(paths["Other"])
