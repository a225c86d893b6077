"""Suppression and RoIAlign of torchvision's names: known values, ties, gradients, and compiled ones where they load."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.metrics.overlap import iou_continuous, suppress
from pretrain.runtime import box_operators
from pretrain.runtime.box_operators import roi_align_by_tensors, suppress_by_tensors
from pretrain.runtime.vision_ops import ensure_torchvision, has_compiled_operators

ensure_torchvision()
compiled = pytest.mark.skipif(not has_compiled_operators(), reason="torchvision's operators do not load beside torch")


def crowded(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes over one another, some of them the same, with scores of few values, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 200
    boxes = torch.cat((corners, corners + 5 + torch.rand(count, 2, generator=generator) * 60), 1)
    boxes[::7] = boxes[0].clone()
    return boxes, torch.randint(40, (count,), generator=generator) / 40


@pytest.mark.parametrize(("count", "at_once"), [(1, 2048), (300, 2048), (300, 17)])
def test_suppression_is_the_greedy_one(count: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once or part by part: what a loop over the boxes by falling score keeps, in that order."""
    from torchvision.ops import nms

    monkeypatch.setattr(box_operators, "BOXES_AT_ONCE", at_once)
    boxes, scores = crowded(count)
    kept = nms(boxes, scores, 0.4)
    wide = boxes.double().numpy(), scores.double().numpy()
    expected = suppress(np.zeros(count, np.int64), *wide, 0.4, iou_continuous)
    assert set(kept.tolist()) == set(expected.tolist()) and kept.dtype == torch.int64
    assert (scores[kept].diff() <= 0).all()


def test_known_heaps() -> None:
    """At the threshold exactly a box stays; of equal scores the first; a box that is no number harms no other."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 5, 10], [20, 20, 20, 20], [float("nan"), 0, 1, 1]])
    scores = torch.tensor([0.5, 0.5, 0.9, 0.1, 0.2])
    assert suppress_by_tensors(boxes, scores, 0.5).tolist() == [2, 0, 4, 3]
    assert suppress_by_tensors(boxes, scores, 0.49).tolist() == [2, 4, 3]
    # The second is suppressed by the first, so that it suppresses nothing: the third stays.
    chain = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    assert suppress_by_tensors(chain, torch.tensor([3.0, 2, 1]), 0.4).tolist() == [0, 2]
    assert suppress_by_tensors(boxes[:0], scores[:0], 0.5).shape == (0,)


def small_boxes(count: int, side: float = 90.0) -> tuple[Tensor, Tensor]:
    """Boxes a tenth as large as their map, some of them over its border; numbers of their maps."""
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * (side + 10) - 5
    return torch.cat((corners, corners + 3 + corners.flip(1).abs() / 20), 1), torch.arange(count) % 2


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [0, 2])
def test_boxes_of_a_large_map_are_pooled_from_windows(
    samples: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the whole map gives, which one large box among them asks for, in value and gradient."""
    maps = torch.randn(2, 3, 44, 47, dtype=torch.float64, requires_grad=True)
    boxes, images = small_boxes(12)
    asked: list[Any] = []
    inside = box_operators._pooled_inside
    monkeypatch.setattr(box_operators, "_pooled_inside", lambda *words: asked.append(words) or inside(*words))
    found = roi_align_by_tensors(maps, boxes, images, (3, 2), 0.5, samples, aligned)
    assert asked
    asked.clear()
    large = torch.cat((boxes, torch.tensor([[0.0, 0, 90, 90]], dtype=torch.float64)))
    whole = roi_align_by_tensors(maps, large, torch.arange(13) % 2, (3, 2), 0.5, samples, aligned)[:12]
    assert not asked
    torch.testing.assert_close(found, whole)
    weights = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad((one * weights).sum(), maps)[0] for one in (found, whole)))


def test_the_operator_of_torchvisions_name_has_a_gradient() -> None:
    from torchvision.ops import roi_align

    maps = torch.randn(2, 2, 9, 11, dtype=torch.float64, requires_grad=True)
    boxes, images = small_boxes(4, 30)
    rois = torch.cat((images[:, None].double(), boxes), 1)
    torch.testing.assert_close(
        roi_align(maps, rois, (3, 2), 0.25, 2), roi_align_by_tensors(maps, boxes, images, (3, 2), 0.25, 2)
    )
    assert torch.autograd.gradcheck(lambda one: roi_align(one, rois, (3, 2), 0.25, 2), maps)
    assert roi_align(maps, rois[:0], 7).shape == (0, 2, 7, 7)


def test_others_still_say_that_they_are_not_compiled() -> None:
    if has_compiled_operators():
        pytest.skip("they are")
    from torchvision.ops import roi_pool

    with pytest.raises(RuntimeError, match="Couldn't load custom C"):
        roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)


@compiled
def test_compiled_operators_give_the_same() -> None:
    from torchvision.ops import nms, roi_align

    boxes, scores = crowded(300)
    for threshold in (0.3, 0.7):
        assert torch.equal(nms(boxes, scores, threshold), suppress_by_tensors(boxes, scores, threshold))
    maps, (small, images) = torch.randn(2, 3, 44, 47), small_boxes(12)
    rois = torch.cat((images[:, None].float(), small.float()), 1)
    ours = roi_align_by_tensors(maps, small.float(), images, (3, 2), 0.5, 2)
    torch.testing.assert_close(roi_align(maps, rois, (3, 2), 0.5, 2), ours, atol=1e-5, rtol=1e-5)
