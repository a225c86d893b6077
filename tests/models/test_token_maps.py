"""Tokens of a SparseFormer on a map: where each lies, and what it weighs there."""

import pytest
import torch

from pretrain.models.sparseformer import ARCHITECTURE, Config
from pretrain.models.sparseformer.token_maps import token_maps
from tests.models.test_sparseformer import SMALL, clip, stirred


def test_a_token_lies_where_its_region_is() -> None:
    """The upper left quarter of a map of 4 x 6, corners in either order; the rest is nobody's."""
    tokens = torch.tensor([[[2.0, -1.0]]])
    for region in ([0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0]):
        maps, weight = token_maps(tokens, torch.tensor([[region]]), (4, 6))
        expected = torch.zeros(4, 6)
        expected[:2, :3] = 1
        assert torch.equal(maps[0], torch.stack((2 * expected, -expected)))
        torch.testing.assert_close(weight[0, 0], expected / 6)


def test_narrow_looks_outweigh_wide_ones_and_what_is_outside_is_lost() -> None:
    boxes = [[0.0, 0.0, 1.0, 1.0], [0.25, 0.0, 0.5, 1.0], [0.5, 0.25, 1.5, 0.75], [2.0, 2.0, 3.0, 3.0]]
    regions = torch.tensor([boxes])
    tokens = torch.tensor([[[1.0], [6.0], [11.0], [99.0]]])
    maps, weight = token_maps(tokens, regions, (1, 4))
    torch.testing.assert_close(weight[0, 0, 0], torch.tensor([0.25, 1.25, 0.5, 0.5]))
    torch.testing.assert_close(maps[0, 0, 0], torch.tensor([1.0, (0.25 + 6) / 1.25, (1 + 11) / 2, (1 + 11) / 2]))


def test_a_region_without_a_size_still_lies_somewhere_or_nowhere() -> None:
    tokens = torch.ones(1, 1, 3, requires_grad=True)
    regions = torch.tensor([[[0.3, 0.3, 0.3, 0.9]]], requires_grad=True)
    maps, weight = token_maps(tokens, regions, (2, 2))
    (maps.sum() + weight.sum()).backward()
    assert all(value.isfinite().all() for value in (maps, weight, tokens.grad, regions.grad))


def test_clips_have_an_axis_of_time() -> None:
    regions = torch.tensor([[[0.0, 0.0, 0.5, 1.0, 0.5, 1.0]]])  # the upper half, in the later half
    maps, weight = token_maps(torch.tensor([[[7.0]]]), regions, (4, 2, 3))
    expected = torch.zeros(4, 2, 3)
    expected[2:, 0] = 7
    assert torch.equal(maps[0, 0], expected) and weight.sum() == pytest.approx(1)


@pytest.mark.parametrize("form", ["v1", "bootstrapped"])
def test_a_model_gives_one_map_of_any_picture(form: str) -> None:
    """Without the class token; in another type the same; a gradient reaches what moved the regions last."""
    model = stirred(form=form)
    pictures = clip(side=40)
    (found,) = model.forward_maps(pictures)
    (level,) = ARCHITECTURE(Config(**{**SMALL, "form": form}), None).maps()
    assert found.shape == (2, level.channels, 3, 3) and level.stride == 16
    tokens, regions = model.encode(pictures)
    expected, _ = token_maps(model.norm(tokens[:, -9:]), regions, (3, 3))
    assert torch.equal(found, expected)
    assert torch.equal(model.forward_maps(pictures[:, 0].permute(0, 3, 1, 2))[0], found)
    found.square().sum().backward()
    moves = {name for name, value in model.named_parameters() if "roi_adjust" in name and value.grad.abs().sum() > 0}
    assert moves == {name for name, _ in model.named_parameters() if "roi_adjust" in name}


def test_clips_give_none() -> None:
    assert ARCHITECTURE(Config(**SMALL, video=True), None).maps() == ()
