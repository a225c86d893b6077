"""Masks as token indices: counts, structure, errors."""

from itertools import product

import numpy as np
import pytest

from pretrain.data.randomness import generator
from pretrain.errors import DataError
from pretrain.samples.masks import MaskPlan, draw, running_cell_maps


def drawn(plan: MaskPlan, position: int = 0):
    return draw(plan, generator(0, position, "encoder_mask"), generator(0, position, "decoder_mask"))


@pytest.mark.parametrize(
    ("height", "ratio", "visible", "targets", "counted"),
    [(14, 0.9, 160, 784, 704), (16, 0.9, 208, 1024, 920), (14, 0.75, 8 * 49, 784, 147 * 4)],
)
def test_published_counts(height: int, ratio: float, visible: int, targets: int, counted: int) -> None:
    plan = MaskPlan(8, height, height, ratio)
    for position in range(8):
        masks = drawn(plan, position)
        assert [masks[name].shape for name in ("visible", "targets", "weight")] == [(visible,), (targets,), (targets,)]
        assert masks["weight"].sum() == counted
    assert (plan.visible, plan.targets) == (visible, targets)


@pytest.mark.parametrize("decoder", ["running_cell", "frame", "random", "none"])
@pytest.mark.parametrize(("time", "height", "width"), [(8, 4, 6), (3, 2, 8), (2, 2, 2), (1, 4, 4)])
def test_any_grid_gives_equal_counts_and_true_weights(decoder: str, time: int, height: int, width: int) -> None:
    plan = MaskPlan(time, height, width, 0.7, decoder, 0.5)
    assert plan.problems() == [] or (decoder == "frame" and time == 1)
    for position in range(20):
        masks = drawn(plan, position)
        assert len(masks["visible"]) == plan.visible and len(masks["targets"]) == plan.targets
        for name in ("visible", "targets"):
            assert masks[name].dtype == np.int64
            assert (np.diff(masks[name]) > 0).all() and masks[name].min() >= 0 and masks[name].max() < plan.tokens
        seen = np.isin(masks["targets"], masks["visible"])
        assert (masks["weight"] == ~seen).all() and masks["weight"].dtype == np.float32


def test_tube_hides_the_same_positions_in_every_slice_and_any_position_can_be_seen() -> None:
    plan = MaskPlan(4, 4, 4, 0.75)
    positions = [drawn(plan, position)["visible"].reshape(4, -1) for position in range(60)]
    for visible in positions:
        assert (visible == visible[0] + 16 * np.arange(4)[:, None]).all()
    assert {int(cell) for visible in positions for cell in visible[0]} == set(range(16))


def test_no_decoder_mask_reconstructs_exactly_the_hidden_tokens() -> None:
    masks = drawn(MaskPlan(4, 4, 4, 0.75, "none"))
    assert sorted([*masks["visible"], *masks["targets"]]) == list(range(64))
    assert masks["weight"].min() == 1


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_running_cells_cover_every_position_equally_often(ratio: float) -> None:
    maps = running_cell_maps(8, 4, 6, ratio)
    assert maps.shape == (4, 8, 24) and set(np.unique(maps)) == {0, 1}
    assert (maps.sum(1) == 8 * ratio).all(), "over eight slices"
    assert (maps.sum(2) == 24 * ratio).all(), "in each slice"
    assert (maps.sum(0) == 4 * ratio).all(), "over the four starts"
    for first, second in product(range(4), range(4)):
        assert (first == second) == bool((maps[first] == maps[second]).all())


def test_every_running_cell_map_is_drawn() -> None:
    plan = MaskPlan(4, 2, 2, 0.5)
    assert len({tuple(drawn(plan, position)["targets"]) for position in range(60)}) == 4


def test_frame_mask_leaves_out_whole_slices() -> None:
    targets = drawn(MaskPlan(8, 4, 4, 0.75, "frame", 0.5))["targets"]
    slices, counts = np.unique(targets // 16, return_counts=True)
    assert len(slices) == 4 and (counts == 16).all()


@pytest.mark.parametrize(("decoder", "ratio"), [("running_cell", 0.5), ("running_cell", 0.25), ("frame", 0.5)])
def test_leaving_out_seen_tokens_keeps_counts_equal(decoder: str, ratio: float) -> None:
    plan = MaskPlan(8, 4, 6, 0.7, decoder, ratio, skip_visible=True)
    assert plan.problems() == []
    for position in range(20):
        masks, both = drawn(plan, position), drawn(MaskPlan(8, 4, 6, 0.7, decoder, ratio), position)
        assert masks["weight"].min() == 1 and len(masks["targets"]) == plan.targets
        assert (masks["targets"] == both["targets"][both["weight"] == 1]).all()


@pytest.mark.parametrize(
    "plan", [MaskPlan(6, 4, 4, 0.7, skip_visible=True), MaskPlan(8, 4, 4, 0.7, "random", 0.5, True)]
)
def test_leaving_out_seen_tokens_is_refused_where_counts_would_vary(plan: MaskPlan) -> None:
    assert "skip_visible_mask_tokens" in plan.problems()[0]
    with pytest.raises(DataError, match="planned"):
        for position in range(50):
            drawn(plan, position)


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        (MaskPlan(8, 7, 7), "even number of cubes"),
        (MaskPlan(8, 4, 7), "even number of cubes"),
        (MaskPlan(8, 4, 4, 0.9, "running_cell", 0.4), "0.25, 0.5 and 0.75"),
        (MaskPlan(8, 4, 4, 0.9, "running_cell", 0.0), "decoder_mask: none"),
        (MaskPlan(8, 4, 4, 0.9, "running_cell", 1.0), "0.25, 0.5 and 0.75"),
        (MaskPlan(8, 4, 4, 0.9, "frame", 0.1), "none of 8 slices"),
        (MaskPlan(8, 4, 4, 0.9, "random", 0.0), "between 0 and 1"),
        (MaskPlan(8, 2, 2, 0.2), "at least one must be hidden"),
        (MaskPlan(8, 4, 4, 1.0), "one visible"),
    ],
)
def test_impossible_plans_are_named(plan: MaskPlan, word: str) -> None:
    assert word in " ".join(plan.problems())


@pytest.mark.parametrize(("height", "ratio"), [(7, 0.5), (4, 0.4)])
def test_running_cells_refuse_what_they_cannot_express(height: int, ratio: float) -> None:
    with pytest.raises(DataError):
        running_cell_maps(8, height, 4, ratio)


def test_masks_are_a_function_of_their_keys() -> None:
    plan = MaskPlan(8, 4, 4, 0.75)
    first, again, other = drawn(plan, 3), drawn(plan, 3), drawn(plan, 4)
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["visible"] != other["visible"]).any()
