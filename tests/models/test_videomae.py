"""The VideoMAE model: published sizes and costs, positions, embedding, init, compute options."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from pretrain.data.randomness import generator
from pretrain.errors import RecipeError
from pretrain.models.cubes import Grid, cut_cubes, grid_of, join_cubes, take_tokens
from pretrain.models.dropout import drop_path_rates
from pretrain.models.positions import SinCosPositions, sinusoid_table
from pretrain.models.videomae import Config, VideoMAE, check, cost, resolve, shape_of
from pretrain.models.vit import written_out_attention
from pretrain.samples.masks import MaskPlan, draw

V1_HUGE = {"decoder_dim": 640, "decoder_depth": 12}
TINY = {
    "size": "custom",
    "patch_size": 4,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "mlp_ratio": 2.5,
    "decoder_dim": 16,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


def tiny(frames: int = 8, height: int = 16, width: int = 24, checkpointing: bool = False, **options) -> VideoMAE:
    torch.manual_seed(0)
    return VideoMAE(Config(**(TINY | options)), frames, height, width, checkpointing)


def inputs(model: VideoMAE, clips: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grid = model.grid
    plan = MaskPlan(grid.time, grid.height, grid.width, 0.7)
    masks = [draw(plan, generator(i, "a"), generator(i, "b")) for i in range(clips)]
    visible, targets = (torch.from_numpy(np.stack([mask[name] for mask in masks])) for name in ("visible", "targets"))
    cubes = torch.randn(clips, plan.visible, model.shape.cube, generator=torch.Generator().manual_seed(1))
    return cubes, visible, targets


@pytest.mark.parametrize(
    ("options", "encoder", "whole"),
    [
        ({"size": "small"}, 21_879_936, 24_029_376),
        ({"size": "base"}, 86_227_200, 94_210_944),
        ({"size": "large"}, 303_860_736, 317_782_016),
        ({"size": "huge"}, 631_607_040, 645_659_392),
        ({"size": "giant"}, 1_011_610_752, 1_026_306_560),
        ({"size": "large", "decoder_depth": 12}, 303_860_736, 342_996_992),
        ({"size": "huge"} | V1_HUGE, 631_607_040, 692_487_296),
    ],
)
def test_parameter_counts_equal_the_published_ones(options: dict, encoder: int, whole: int) -> None:
    with torch.device("meta"):
        model = VideoMAE(Config(**options), 16, 224, 224)
    assert sum(value.numel() for value in model.encoder.parameters()) == encoder
    assert sum(value.numel() for value in model.parameters()) == whole


@pytest.mark.parametrize(
    ("size", "without", "dual"),
    [
        ("small", "11.5", "7.84"),
        ("base", "35.4", "25.8"),
        ("large", "83.0", "68.3"),
        ("huge", "136.9", "122.1"),
        ("giant", "264.0", "241.6"),
    ],
)
def test_cost_equals_the_published_one(size: str, without: str, dual: str) -> None:
    config = Config(size=size)
    grid = grid_of(16, 224, 224, 2, shape_of(config).patch_size)
    for decoder, published in (("none", without), ("running_cell", dual)):
        plan = MaskPlan(grid.time, grid.height, grid.width, 0.9, decoder)
        total = sum(cost(config, grid, plan.visible, plan.targets).values()) / 1e9
        assert f"{total:.{len(published.split('.')[1])}f}" == published


def test_cost_is_what_is_executed() -> None:
    model = tiny()
    cubes, visible, targets = inputs(model, clips=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(cubes, visible, targets)
    parts = cost(model.config, model.grid, visible.shape[1], targets.shape[1])
    executed = sum(value for name, value in parts.items() if not name.startswith("skipped"))
    assert counter.get_total_flops() == 2 * executed


def test_embedding_of_visible_cubes_equals_the_convolution() -> None:
    model = tiny()
    video = torch.randn(2, 8, 16, 24, 3)
    projection = model.encoder.patch_embed.proj
    convolved = F.conv3d(video.movedim(-1, 1), projection.weight, projection.bias, stride=(2, 4, 4))
    index = inputs(model)[1]
    everything = convolved.flatten(2).transpose(1, 2)
    embedded = model.encoder.patch_embed(take_tokens(cut_cubes(video, 2, 4), index))
    assert_close(embedded, take_tokens(everything, index))


def test_cubes_are_numbered_time_rows_columns_and_join_again() -> None:
    video = torch.arange(4 * 6 * 8 * 3).reshape(1, 4, 6, 8, 3)
    cubes = cut_cubes(video, 2, 2)
    grid = Grid(2, 3, 4)
    t, y, x = 1, 2, 3
    assert_close(cubes[0, (t * 3 + y) * 4 + x], video[0, 2:4, 4:6, 6:8].flatten())
    assert_close(join_cubes(cubes, grid, 2, 2), video)


def test_positions_are_the_float64_sinusoid() -> None:
    table = sinusoid_table(1568, 6)
    for token, column in ((0, 0), (1, 3), (1567, 0), (1567, 5), (1000, 2)):
        angle = token / 10000 ** (2 * (column // 2) / 6)
        exact = math.sin(angle) if column % 2 == 0 else math.cos(angle)
        assert table[token, column].item() == np.float32(exact)


def test_positions_survive_casts_and_the_meta_device() -> None:
    exact = sinusoid_table(50, 8)
    module = SinCosPositions(50, 8)
    assert_close(module.bfloat16().float().table, exact, rtol=0, atol=0)
    with torch.device("meta"):
        built = SinCosPositions(50, 8)
    assert built.table.is_meta
    assert_close(built.to_empty(device="cpu").table, exact, rtol=0, atol=0)
    assert not module.state_dict()


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 8, 8), (6, 8, 24), (10, 16, 8)])
def test_any_clip_of_whole_cubes(frames: int, height: int, width: int) -> None:
    model = tiny(frames, height, width)
    cubes, visible, targets = inputs(model)
    predicted = model(cubes, visible, targets)
    assert predicted.shape == (2, targets.shape[1], 3 * 2 * 4 * 4)
    assert predicted.isfinite().all()


@pytest.mark.parametrize(
    ("options", "size", "word"),
    [
        ({}, (7, 16, 16), "input.frames=7"),
        ({}, (8, 18, 16), "input.height=18"),
        ({}, (8, 16, 17), "input.width=17"),
        ({"heads": 5}, (8, 16, 16), "model.heads=5"),
        ({"decoder_heads": 3}, (8, 16, 16), "model.decoder_heads=3"),
        ({"drop_path": 1.0}, (8, 16, 16), "model.drop_path"),
        ({"dim": None}, (8, 16, 16), "model.dim: null"),
    ],
)
def test_what_does_not_fit_is_named(options: dict, size: tuple[int, int, int], word: str) -> None:
    config = Config(**(TINY | options))
    assert word in check(config, *size)[0]
    with pytest.raises(RecipeError, match=word.split("=")[0]):
        VideoMAE(config, *size)


def test_overrides_beat_the_size() -> None:
    full = resolve(Config(size="giant", decoder_depth=2))
    assert (full.patch_size, full.dim, full.decoder_depth, full.decoder_norm_eps) == (14, 1408, 2, 1e-6)


def test_hidden_channels_are_rounded_down() -> None:
    model = tiny(mlp_ratio=2.49)
    assert model.encoder.blocks[0].mlp.fc1.out_features == 59
    assert model.decoder.blocks[0].mlp.fc1.out_features == 39


def test_epsilons() -> None:
    model = tiny(norm_eps=1e-12, decoder_norm_eps=1e-5)
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert found.pop("decoder.norm") == 1e-5
    assert len(found) == 9 and set(found.values()) == {1e-12}
    assert tiny().decoder.norm.eps == 1e-6


def test_layer_scale_multiplies_both_branches() -> None:
    block, x = tiny(layer_scale=0.1).encoder.blocks[0], torch.randn(2, 5, 24)
    nn.init.normal_(block.gamma_1)
    nn.init.normal_(block.gamma_2)
    middle = x + block.gamma_1 * block.attn(block.norm1(x))
    assert_close(block(x), middle + block.gamma_2 * block.mlp(block.norm2(middle)))


def test_initialisation() -> None:
    model = tiny(dim=240, heads=3)
    attention = model.encoder.blocks[0].attn
    bound = math.sqrt(6 / (240 + 720))  # Xavier for one [3C, C] matrix, not for three
    assert 0.99 * bound < attention.qkv.weight.abs().max() <= bound
    assert 0.99 * math.sqrt(6 / (16 + 96)) < model.decoder.head.weight.abs().max() <= math.sqrt(6 / (16 + 96))
    convolution = nn.Conv3d(3, 240, (2, 4, 4))
    for found, like in (
        (model.encoder.patch_embed.proj.weight, convolution.weight),
        (model.encoder.patch_embed.proj.bias, convolution.bias),
        (model.encoder_to_decoder.weight, nn.Linear(240, 16, bias=False).weight),
    ):
        assert 0.9 < found.abs().max() / like.abs().max() < 1.1
    assert 0.005 < model.mask_token.abs().max() <= 0.02
    zero = [name for name, value in model.named_parameters() if value.ndim == 1 and not value.any()]
    ones = [name for name, value in model.named_parameters() if value.ndim == 1 and (value == 1).all()]
    assert all("norm" in name for name in ones) and len(ones) == 10
    assert {name.split(".")[-1] for name in zero} == {"bias", "q_bias", "v_bias"}
    assert len(zero) + len(ones) + 1 == sum(value.ndim == 1 for value in model.parameters())


def test_keys_have_no_bias_and_options_add_their_parameters() -> None:
    plain, full = tiny(), tiny(cosine_attention=True, layer_scale=0.1)
    added = {name.split(".", 3)[-1] for name in full.state_dict().keys() - plain.state_dict().keys()}
    assert added == {"gamma_1", "gamma_2", "attn.scale"}
    assert full.encoder.blocks[0].attn.scale.shape == (3, 1, 1)
    assert_close(full.encoder.blocks[0].attn.scale.detach(), torch.full((3, 1, 1), math.log(10)))
    assert not any("k_bias" in name for name in plain.state_dict())


def test_cosine_scale_is_clamped_at_100() -> None:
    model = tiny(cosine_attention=True).double()
    attention, x = model.encoder.blocks[0].attn, torch.randn(1, 5, 24, dtype=torch.float64)
    outputs = []
    for value in (4.6052, 9.0, 3.0):
        nn.init.constant_(attention.scale, value)
        outputs.append(attention(x))
    assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_activation_checkpointing_changes_nothing_but_memory() -> None:
    results = []
    for checkpointing in (False, True, "selective"):
        model = tiny(checkpointing=checkpointing)
        loss = model(*inputs(model)).square().mean()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            again = model(*inputs(model)).square().mean()
        again.backward()
        results.append((loss.detach(), gradients(model), sum(saved)))
    (plain, plain_gradients, plain_saved), *recomputed = results
    for loss, found, saved in recomputed:
        assert_close(loss, plain, rtol=0, atol=0)
        assert len(found) == len(list(model.parameters()))
        for name, value in plain_gradients.items():
            assert_close(found[name], value)
        assert saved < plain_saved / 3  # what selective checkpointing keeps lies in its own store


def test_attention_written_out_is_attention() -> None:
    query, key, value = (torch.randn(2, 3, 50, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.3)
    for found in (
        written_out_attention(query, key, value, 0.3),
        F.scaled_dot_product_attention(query, key, value, scale=0.3),
    ):
        assert_close(found.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph(checkpointing: bool) -> None:
    model = tiny(checkpointing=checkpointing)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager = model(*inputs(model)).square().mean()
    eager.backward()
    expected = gradients(model)
    model.zero_grad()
    loss = compiled(*inputs(model)).square().mean()
    loss.backward()
    assert_close(loss, eager)
    for name, value in gradients(model).items():
        assert_close(value, expected[name])


def test_stochastic_depth_skips_whole_samples_in_training_only() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    model = tiny(drop_path=0.5)
    block, x = model.encoder.blocks[1], torch.randn(64, 3, 24)
    moved = (block(x) != x).flatten(1).any(1)
    assert 0 < (~moved).sum() < 64
    assert (block.eval()(x) != x).flatten(1).any(1).all()
    assert (model.encoder.blocks[0](x) != x).flatten(1).any(1).all(), "the first block's rate is 0"


def test_bfloat16_follows_float32() -> None:
    model = tiny()
    exact = model(*inputs(model))
    rounded = model.bfloat16()(*inputs(model))
    assert rounded.dtype == torch.bfloat16
    assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
