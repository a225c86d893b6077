"""The classifier: published sizes and costs, pooling, positions on other grids, initialisation, regularisation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from pretrain.errors import RecipeError
from pretrain.models.classifier import Config, VideoClassifier, check, cost, layer_id
from pretrain.models.cubes import Grid, grid_of
from pretrain.models.positions import InterpolatedPositions, sinusoid_table, stretch_table

TINY = {"size": "custom", "patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.0, "classes": 5}
TINY |= {"pretrain_frames": 8, "pretrain_height": 16, "pretrain_width": 16}


def tiny(frames: int = 8, height: int = 16, width: int = 16, checkpointing: bool = False, **options) -> VideoClassifier:
    torch.manual_seed(0)
    return VideoClassifier(Config(**(TINY | options)), frames, height, width, checkpointing)


def clips(frames: int = 8, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(2, frames, height, width, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "counts", "gmac"),
    [
        ("small", (22_033_936, 22_153_286), 56.9),
        ("base", (86_534_800, 86_773_190), 180.3),
        ("large", (304_270_736, 304_588_486), 596.8),
        ("huge", (632_119_440, 632_516_550), 1191),
        ("giant", (1_012_174_352, 1_012_611_142), 2543),
    ],
)
def test_published_sizes(size: str, counts: tuple[int, int], gmac: float) -> None:
    for classes, expected in zip((400, 710), counts, strict=True):
        with torch.device("meta"):
            model = VideoClassifier(Config(size=size, classes=classes), 16, 224, 224)
        assert sum(value.numel() for value in model.parameters()) == expected
    assert abs(sum(cost(model.config, model.grid).values()) / 1e9 - gmac) < (0.06 if gmac < 1000 else 0.6)


@pytest.mark.parametrize("size", [(8, 16, 16), (4, 24, 16), (12, 8, 20), (2, 16, 32)])
@pytest.mark.parametrize("positions", ["rebuild", "interpolate"])
def test_any_grid(size: tuple[int, int, int], positions: str) -> None:
    model = tiny(*size, positions=positions).eval()
    assert model(clips(*size)).shape == (2, 5)
    dense = model.forward_features(clips(*size), pooled=False)
    assert dense.shape == (2, model.grid.tokens, 24)
    assert_close(model.fc_norm(dense.mean(1)), model.forward_features(clips(*size)))


def test_clips_of_another_size_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"\(4, 16, 16\)"):
        tiny()(clips(4))


def test_positions_of_the_pretraining_grid_are_its_table() -> None:
    rebuilt, stretched = tiny(positions="rebuild").positions.table, tiny().positions.table
    assert torch.equal(rebuilt, stretched) and torch.equal(rebuilt, sinusoid_table(64, 24))


def test_stretching_keeps_places() -> None:
    """A table of plain coordinates: cell centres of the new grid lie at the same share of the old one's extent."""
    source, grid = Grid(8, 14, 10), Grid(5, 9, 21)
    axes = [(torch.arange(size) + 0.5) / size for size in (8, 14, 10)]
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    found = stretch_table(table, source, grid).unflatten(0, (5, 9, 21))
    wanted = [(torch.arange(size) + 0.5) / size for size in (5, 9, 21)]
    for axis, inner in ((0, slice(1, -1)), (1, slice(2, -2)), (2, slice(5, -5))):  # edges flatten
        along = found[..., axis].movedim(axis, 0)[inner]
        assert_close(along, wanted[axis][inner].view(-1, 1, 1).expand_as(along), rtol=0, atol=0.015)


def test_stretched_table_survives_casts() -> None:
    positions = InterpolatedPositions(Grid(4, 5, 6), Grid(8, 14, 14), 16)
    before = positions.table.clone()
    assert torch.equal(positions.bfloat16().float().table, before)
    assert not positions.state_dict()


def test_official_stretching_where_it_works() -> None:
    """64 frames at 288 pixels: bicubic over each plane of the 8-step table, then linear over time."""
    table = sinusoid_table(8 * 6 * 6, 12)
    planes = table.view(8, 6, 6, 12).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(9, 9), mode="bicubic", align_corners=False)
    lines = planes.permute(2, 3, 1, 0).reshape(81, 12, 8)
    lines = F.interpolate(lines, size=32, mode="linear")
    expected = lines.view(9, 9, 12, 32).permute(3, 0, 1, 2).reshape(-1, 12)
    assert_close(stretch_table(table, Grid(8, 6, 6), Grid(32, 9, 9)), expected)


def test_token0_is_the_first_token_behind_norm() -> None:
    model = tiny(pooling="token0").eval()
    assert model.fc_norm is None and "norm.weight" in model.state_dict()
    dense = model.forward_features(clips(), pooled=False)
    assert_close(model.forward_features(clips()), dense[:, 0])
    assert_close(dense.mean(-1), torch.zeros(2, 64), atol=1e-5, rtol=0)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = VideoClassifier(Config(size="small", classes=400), 2, 16, 16)
    for layer in (model.blocks[3].attn.qkv, model.blocks[3].attn.proj, model.blocks[3].mlp.fc1):
        assert abs(layer.weight.std() - 0.02) < 0.001
    assert abs(model.head.weight.std() - 0.02 * 0.001) < 1e-6 and not model.head.bias.any()
    probe = VideoClassifier(Config(size="small", classes=400, head="batch_norm"), 2, 16, 16)
    assert abs(probe.head[1].weight.std() - 0.01) < 0.001


def test_features_without_a_head() -> None:
    model = tiny(classes=0).eval()
    assert torch.equal(model(clips()), model.forward_features(clips()))


@pytest.mark.parametrize("name", ["head_dropout", "dropout", "attention_dropout", "drop_path"])
def test_regularisation_acts_in_training_only(name: str) -> None:
    model = tiny(**{"drop_path": 0.0, "head_init_scale": 1.0, name: 0.5})
    plain = tiny(drop_path=0.0, head_init_scale=1.0).eval()
    assert torch.equal(model.eval()(clips()), plain(clips()))
    model.train()
    assert not torch.equal(model(clips()), model(clips()))


def test_no_dropout_layers_unless_asked() -> None:
    assert not [module for module in tiny(drop_path=0.0).modules() if isinstance(module, nn.Dropout)]


def test_checkpointing_gives_equal_gradients_with_dropout() -> None:
    gradients = []
    for recompute in (False, True):
        model = tiny(checkpointing=recompute, dropout=0.2, drop_path=0.2, head_init_scale=1.0)
        torch.manual_seed(5)
        model(clips()).square().sum().backward()
        gradients.append([value.grad for value in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)


def test_layer_ids() -> None:
    model = tiny(pooling="mean")
    found = {name: layer_id(name, 2) for name, _ in model.named_parameters()}
    assert {found[name] for name in found if name.startswith("patch_embed.")} == {0}
    assert found["blocks.0.norm1.weight"] == 1 and found["blocks.1.mlp.fc2.bias"] == 2
    assert found["fc_norm.weight"] == found["head.bias"] == 3


def test_problems_are_listed_together() -> None:
    config = Config(**(TINY | {"heads": 5, "head_dropout": 1.0, "classes": -1, "pretrain_width": 18}))
    problems = check(config, 8, 18, 16)
    assert [problem.split("=")[0] for problem in problems] == [
        "model.head_dropout", "model.heads", "model.classes", "input.height", "input.width",
    ]  # fmt: skip
    assert "pretrain" in problems[-1]
    assert check(Config(size="custom", dim=8), 16, 224, 224)[0].startswith("model.patch_size: null")


def test_cost_counts_matrix_products() -> None:
    model = tiny(classes=7).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clips()[:1])
    assert counter.get_total_flops() == 2 * sum(cost(model.config, grid_of(8, 16, 16, 2, 4)).values())
