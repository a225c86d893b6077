"""EVAD beyond the goldens: places and gradients, cost against the published, sizes, refusals, weights."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.cubes import Grid
from pretrain.models.evad.context import extend_boxes_inclusive, placed
from pretrain.models.evad.detector import EVAD, cost
from pretrain.models.evad.detector_config import Config, check, localisation_sizes, pruning_of, resolve
from pretrain.models.evad.detector_weights import export_detector, load_detector
from pretrain.models.evad.grid_positions import GridPositions
from pretrain.models.evad.localisation import LocalisationHead, move_boxes, pool_by_level
from pretrain.models.evad.pyramid import SCALES, levels_of
from pretrain.models.keep_rates import keep_rates, token_counts
from pretrain.models.positions import sinusoid_table
from pretrain.models.weight_files import read_raw

TINY = Config(
    size="custom", patch_size=4, dim=24, depth=4, heads=2, mlp_ratio=2.0, classes=5, drop_path=0.0, pretrain_side=16,
    keep_rate=0.75, queries=6, rcnn_heads=2, query_dim=16, query_heads=2, query_hidden=24, dynamic_dim=4, pool_size=3,
    action_pool_size=3, decoder_dim=12, decoder_depth=2, decoder_heads=2, decoder_drop_path=0.0, action_hidden=20,
)  # fmt: skip
SIZES = torch.tensor([[32, 24], [20, 32]])


def detector(**changes) -> EVAD:
    torch.manual_seed(0)
    model = EVAD(dataclasses.replace(TINY, **changes), 8, 32, 32)
    # Large enough for attention, and so the scores of tokens, to differ.
    for value in model.blocks.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return model.eval()


def clips(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 8, height, width, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("config", "published", "gmacs"),
    [
        (Config(size="base", keep_rate=1.0), 425, 410),
        (Config(size="base", keep_rate=0.7), 243, 228),
        (Config(size="base", keep_rate=0.6), 209, 194),
        (Config(size="large", keep_rate=0.7), 737, 722),
    ],
)
def test_cost_is_the_published(config: Config, published: int, gmacs: int) -> None:
    """Published numbers hold localisation, the specification's own count (encoder, projection, decoder) does not."""
    found = cost(config, Grid(8, 18, 18))
    counted = sum(found.macs[part] for part in ("cube embedding", "attention", "MLP", "projection", "context decoder"))
    assert round(counted / 1e9) == gmacs
    assert found.published / 1e9 == pytest.approx(published, abs=1.5)
    assert found.tokens["all"] == 2592


@pytest.mark.parametrize(("rate", "left"), [(0.7, [1815, 1271, 890]), (0.6, [1556, 934, 561])])
def test_tokens_left_are_the_published(rate: float, left: list[int]) -> None:
    rates = keep_rates(pruning_of(Config(keep_rate=rate)), 12)
    assert [token_counts(2592, rates, fuse=False)[block] for block in (3, 6, 9)] == left
    assert cost(Config(keep_rate=rate), Grid(8, 18, 18)).tokens["behind the encoder"] == left[-1]


def test_sizes_fix_what_is_left_open() -> None:
    large = resolve(Config(size="large"))
    assert (large.dim, large.decoder_dim, large.decoder_depth, large.drop_path) == (1024, 512, 12, 0.2)
    assert large.fpn_blocks == [5, 11, 17, 23] and resolve(Config()).fpn_blocks == [2, 5, 8, 11]
    assert resolve(Config(decoder_depth=2)).decoder_depth == 2


def test_first_weights() -> None:
    model = detector()
    assert_close(model.init_proposal_boxes(), torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(6, -1))
    head = model.det_head.s0_headseries[0]
    bound = (6 / (16 + 2)) ** 0.5
    assert float(head.class_logits.weight.detach().abs().max()) <= bound
    assert not model.fpn_output3.bias.any() and not head.self_attn.in_proj_bias.any()
    assert not model.det_head.decoder.blocks[0].action_logits.bias.any() and model.det_head.mask_token.any()


def test_frames_of_any_size_and_length_of_a_batch() -> None:
    model = detector()
    for height, width in ((32, 32), (24, 48), (8, 64)):
        found = model(clips(height, width), SIZES.clamp(max=min(height, width)))
        assert found.action_logits[-1].shape == (2, 6, 5) and found.boxes[-1].isfinite().all()
    with pytest.raises(RecipeError, match="frames of 28 x 32 pixels: multiples of 8 are needed"):
        model(clips(28, 32), SIZES)
    with pytest.raises(RecipeError, match="clips of 4 frames for a model built for 8"):
        model(clips()[:, :4], SIZES)


def test_clips_of_a_batch_do_not_mix() -> None:
    model = detector()
    together, alone = model(clips(), SIZES), model(clips()[1:], SIZES[1:])
    assert_close(together.boxes[-1][1:], alone.boxes[-1], rtol=1e-4, atol=1e-4)
    assert_close(together.action_logits[-1][1:], alone.action_logits[-1], rtol=1e-4, atol=1e-4)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = EVAD(TINY, 8, 32, 32, activation_checkpointing=recompute)
        found = model(clips(), SIZES)
        (found.action_logits[-1].square().sum() + found.person_logits[-1].square().sum()).backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        assert_close(gradients[1][name], one, msg=name)


@pytest.mark.parametrize("order", ["positional", "official"])
def test_places_of_surviving_tokens(order: str) -> None:
    """Positional: every token is put where it comes from; official: the highest score on the lowest place."""
    model = detector(token_order=order)
    video = clips()
    grid = model.grid_of(video)
    tokens = model.encode(video, grid)
    places = placed(tokens.origin, grid.slice, order == "official")
    keyframe, others = tokens.origin[:, : grid.slice], tokens.origin[:, grid.slice :]
    assert_close(keyframe, torch.arange(2 * grid.slice, 3 * grid.slice).expand(2, -1))
    assert torch.equal(places.sort(1).values, tokens.origin.sort(1).values)
    assert torch.equal(places, tokens.origin) is (order == "positional")
    assert bool((others.diff(dim=1) > 0).all()) is (order == "positional")


def test_unpruned_is_the_same_in_both_orders() -> None:
    one, two = (detector(token_order=order, keep_rate=1.0)(clips(), SIZES) for order in ("positional", "official"))
    assert torch.equal(one.action_logits[-1], two.action_logits[-1])


def test_levels_by_area() -> None:
    sides = torch.tensor([10.0, 111, 112, 223, 224, 447, 448, 5000, float("nan")])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), dim=1)
    assert levels_of(boxes).tolist() == [2, 2, 3, 3, 4, 4, 5, 5, 2]


@pytest.mark.parametrize("patch_size", [4, 8, 16])
def test_boxes_are_pooled_where_they_lie_whatever_the_patch(patch_size: int) -> None:
    """Strides of the pyramid follow from the token grid; those of patches of 16 would look elsewhere."""
    sizes = localisation_sizes(dataclasses.replace(resolve(TINY), patch_size=patch_size))
    side = 32 * patch_size
    pyramid = [torch.randn(1, sizes.dim, int(32 * scale), int(32 * scale), requires_grad=True) for scale in SCALES]
    # Of 8 and 20 patches, upper left and lower right: pooled from levels 3 and 4 of any patch size.
    boxes = torch.tensor([[[4.0, 6, 12, 14], [10, 11, 30, 31]]]) * patch_size
    for index, (level, first, last) in enumerate(((1, (4, 6), (12, 14)), (2, (10, 11), (30, 31)))):
        features = torch.randn(1, 1, sizes.dim)
        _, moved, _ = LocalisationHead(sizes)(pyramid, boxes[:, index : index + 1], features)
        gradients = torch.autograd.grad(moved.sum(), pyramid)
        assert [bool(one.any()) for one in gradients] == [number == level for number in range(4)]
        rows, columns = gradients[level].abs().sum((0, 1)).nonzero().T.float() * side / len(gradients[level][0, 0])
        reach = side / len(gradients[level][0, 0])  # samples take neighbouring places
        for found, low, high in ((columns, first[0], last[0]), (rows, first[1], last[1])):
            assert low * patch_size - reach <= float(found.min()) <= (low + 1) * patch_size
            assert (high - 2) * patch_size <= float(found.max()) <= high * patch_size


def test_levels_without_boxes_get_zero_gradients() -> None:
    pyramid = [torch.randn(1, 3, side, side, requires_grad=True) for side in (32, 16, 8, 4)]
    pool_by_level(
        pyramid, torch.tensor([[0.0, 0.0, 20.0, 30.0]]), torch.zeros(1, dtype=torch.int64), 2
    ).sum().backward()
    assert all(one.grad is not None for one in pyramid)
    assert pyramid[0].grad.any() and not any(one.grad.any() for one in pyramid[1:])


def test_boxes_move_and_grow() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert_close(move_boxes(boxes, torch.zeros(1, 4)), boxes)
    assert_close(move_boxes(boxes, torch.tensor([[1.0, -1.0, 0.0, 0.0]])), torch.tensor([[20.0, 0.0, 40.0, 40.0]]))
    doubled = move_boxes(boxes, torch.tensor([[0.0, 0.0, 2.0, 2.0]]).log1p() * torch.tensor([0.0, 0, 1, 1]))
    assert_close(doubled, torch.tensor([[-10.0, -20.0, 50.0, 100.0]]))
    assert move_boxes(boxes, torch.full((1, 4), 1e4)).isfinite().all(), "growth has a limit"


def test_extended_boxes_end_at_last_pixels() -> None:
    boxes = torch.tensor([[[10.0, 10.0, 19.0, 29.0], [-50.0, 5.0, 90.0, 99.0]]])
    found = extend_boxes_inclusive(boxes, torch.tensor([[40, 30]]), (0.4, 0.2))
    assert_close(found, torch.tensor([[[8.0, 8.0, 21.0, 31.0], [0.0, 0.0, 29.0, 39.0]]]))


def test_positions_of_other_grids() -> None:
    source = Grid(2, 4, 4)
    table, like = sinusoid_table(source.tokens, 6), torch.zeros(1)
    assert torch.equal(GridPositions(source, 6)(source, like), table)
    turned = Grid(2, 2, 8)
    assert torch.equal(GridPositions(source, 6, "official")(turned, like), table), "a quirk: as many tokens"
    assert not torch.equal(GridPositions(source, 6)(turned, like), table)
    wide = GridPositions(source, 6, "official")
    assert wide(Grid(2, 4, 8), like).shape == (64, 6) and wide(Grid(2, 4, 8), like) is wide(Grid(2, 4, 8), like)


@pytest.mark.parametrize(
    ("changes", "size", "told"),
    [
        ({"keep_rate": 0.3}, (8, 32, 32), "model.keep_rate=0.3: 8 of 256 tokens would be left, allowed: more than the"),
        ({"keep_rate": 1.5}, (8, 32, 32), "model.keep_rate=1.5: above 0"),
        ({"prune_blocks": [4]}, (8, 32, 32), r"model.prune_blocks=\[4\]: this model has blocks 0 to 3"),
        ({"fpn_blocks": [0, 1, 1, 3]}, (8, 32, 32), r"model.fpn_blocks: found \[0, 1, 1, 3\], allowed: 4 different"),
        ({}, (6, 32, 32), "input.frames=6: a multiple of 4 is needed"),
        ({}, (8, 32, 36), "frames of 32 x 36 pixels: multiples of 8"),
        ({"decoder_heads": 5}, (8, 32, 32), "model.decoder_heads=5: does not divide model.decoder_dim=12"),
        ({"decoder_drop_path": 1.0}, (8, 32, 32), "model.decoder_drop_path=1.0: a probability"),
        ({"queries": 0}, (8, 32, 32), "model.queries: found 0"),
        ({"decoder_dim": None}, (8, 32, 32), "model.decoder_dim: null, but model.size=custom"),
    ],
)
def test_what_cannot_be_built_is_told(changes: dict, size: tuple[int, int, int], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        EVAD(dataclasses.replace(TINY, **changes), *size)
    assert check(TINY, 8, 32, 32) == []


def pretrained(model: EVAD, decoder_dim: int = 12, depth: int = 1) -> dict[str, Tensor]:
    """A pre-trained VideoMAE with the model's encoder, and a decoder."""
    state = {f"encoder.{name}": value + 1 for name, value in model.state_dict().items()
             if name.startswith(("patch_embed", "blocks", "norm"))}  # fmt: skip
    other = detector(decoder_dim=decoder_dim, decoder_depth=depth).det_head.state_dict()
    kept = {name: value + 1 for name, value in other.items()
            if name.startswith(("decoder.", "encoder_to_decoder.")) and "act" not in name}  # fmt: skip
    return state | kept | {"mask_token": torch.zeros(1, 1, decoder_dim), "decoder.norm.weight": torch.ones(decoder_dim)}


@pytest.mark.parametrize(("decoder_dim", "taken"), [(12, True), (8, False)])
def test_start_from_a_pretrained_videomae(decoder_dim: int, taken: bool) -> None:
    model = detector()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_detector(model, "file", pretrained(model, decoder_dim))
    after = model.state_dict()
    assert_close(after["blocks.2.mlp.fc1.weight"], first["blocks.2.mlp.fc1.weight"] + 1)
    assert_close(after["norm.weight"], first["norm.weight"] + 1)
    name = "det_head.decoder.blocks.0.attn.qkv.weight"
    assert (name in report.matched) is taken and torch.equal(after[name], first[name]) is not taken
    assert ("det_head.encoder_to_decoder.weight" in report.matched) is taken
    assert torch.equal(
        after["det_head.decoder.blocks.1.mlp.fc2.weight"], first["det_head.decoder.blocks.1.mlp.fc2.weight"]
    )
    assert "mask_token" in report.unexpected and "decoder.norm.weight" in report.unexpected


def test_start_from_a_fine_tuned_videomae() -> None:
    model = detector()
    state = {
        name: value + 1 for name, value in model.state_dict().items() if name.startswith(("patch_embed", "blocks"))
    }
    state |= {"fc_norm.weight": torch.full((24,), 7.0), "head.weight": torch.zeros(400, 24)}
    report = load_detector(model, "file", state)
    assert {"norm.weight", "norm.bias"} <= set(report.missing) and torch.equal(model.norm.weight, torch.ones(24))
    del state["blocks.3.mlp.fc2.bias"]
    with pytest.raises(WeightsError, match="missing: blocks.3.mlp.fc2.bias"):
        load_detector(model, "file", state)


def test_released_layout_out_and_in(tmp_path: Path) -> None:
    model, other = detector(), detector()
    for value in model.parameters():
        torch.nn.init.normal_(value)
    file = str(tmp_path / "evad.pth")
    export_detector(model, file)
    raw = read_raw(file)
    assert_close(raw["criterion.empty_weight"], torch.tensor([1.0, 0.1]))
    report = load_detector(other, file, raw)
    assert not report.missing and report.unexpected == ["criterion.empty_weight"]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(("classes", "head"), [(7, "match"), (5, "new")])
def test_another_set_of_actions_starts_with_new_classifiers(classes: int, head: str) -> None:
    model, source = detector(classes=classes), detector()
    for value in source.parameters():
        torch.nn.init.normal_(value)
    report = load_detector(model, "file", source.state_dict(), head)
    assert sorted(report.missing) == sorted(name for name in model.state_dict() if "action_logits" in name)
    assert torch.equal(model.det_head.mask_token, source.det_head.mask_token)
    broken = {name: value for name, value in source.state_dict().items() if "reg_module" not in name}
    with pytest.raises(WeightsError, match="missing: det_head.s0_headseries.0.reg_module"):
        load_detector(model, "file", broken, head)
