"""RoIAlign: against sums written out sample by sample, on boxes that end anywhere."""

import math

import pytest
import torch
from torch import Tensor

from pretrain.models.roi_align import roi_align
from pretrain.runtime import box_operators
from pretrain.runtime.box_operators import roi_align_by_tensors
from pretrain.runtime.vision_ops import has_compiled_operators


def one_sample(picture: Tensor, y: float, x: float) -> Tensor:
    """Bilinear value [C] of a map [C, H, W] at a place; zero outside [-1, H] x [-1, W]."""
    height, width = picture.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return picture.new_zeros(len(picture))

    def ends(at: float, length: int) -> tuple[int, int, float]:
        at = max(at, 0.0)
        low = math.floor(at)
        return (length - 1, length - 1, 0.0) if low >= length - 1 else (low, low + 1, at - low)

    top, bottom, down = ends(y, height)
    left, right, across = ends(x, width)
    upper = picture[:, top, left] * (1 - across) + picture[:, top, right] * across
    lower = picture[:, bottom, left] * (1 - across) + picture[:, bottom, right] * across
    return upper * (1 - down) + lower * down


def written_out(features: Tensor, box: list[float], image: int, size: int, scale: float, samples: int, aligned: bool):
    """RoIAlign [C, P, P] of one box, loop by loop (systems/action_detection.md 3.3)."""
    x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0) for value in box)
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    down, across = (samples or max(math.ceil(side / size), 0) for side in (height, width))
    pooled = features.new_zeros(features.shape[1], size, size)
    for row in range(size):
        for column in range(size):
            for i in range(down):
                for j in range(across):
                    y = y1 + row * height / size + (i + 0.5) * height / size / down
                    x = x1 + column * width / size + (j + 0.5) * width / size / across
                    pooled[:, row, column] += one_sample(features[image], y, x) / (down * across)
    return pooled


BOXES = [
    [3.0, 5.0, 70.0, 61.0],
    [-40.0, -20.0, 30.0, 25.0],  # over the upper left corner
    [60.0, 50.0, 200.0, 170.0],  # over the lower right one
    [10.0, 10.0, 10.0, 10.0],  # without area
    [500.0, 500.0, 600.0, 600.0],  # far outside
    [0.0, 0.0, 95.9, 79.9],
    [31.7, 8.2, 33.1, 77.0],  # narrow
]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("samples", [0, 2])
def test_sums_are_those_written_out(aligned: bool, samples: int) -> None:
    features = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    boxes, images = torch.tensor(BOXES, dtype=torch.float64), torch.arange(len(BOXES)) % 2
    found = roi_align_by_tensors(features, boxes, images, 3, 1 / 16, samples, aligned)
    for box, image, pooled in zip(BOXES, images.tolist(), found, strict=True):
        torch.testing.assert_close(pooled, written_out(features, box, image, 3, 1 / 16, samples, aligned))


def test_boxes_done_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, boxes = torch.randn(1, 4, 9, 7), torch.tensor(BOXES)
    images = torch.zeros(len(BOXES), dtype=torch.int64)
    whole = roi_align_by_tensors(features, boxes, images, 7, 1 / 16)
    monkeypatch.setattr(box_operators, "VALUES_AT_ONCE", 1)
    assert torch.equal(roi_align_by_tensors(features, boxes, images, 7, 1 / 16), whole)


@pytest.mark.parametrize("aligned", [False, True])
def test_boxes_inside_need_no_look_at_their_sizes(aligned: bool) -> None:
    """The samples of the largest box that there can be: the others' weights are zero."""
    features, generator = torch.randn(2, 3, 5, 16), torch.Generator().manual_seed(4)
    corners = torch.rand(12, 2, 2, generator=generator).sort(1).values * torch.tensor([16 * 16 - 1.0, 5 * 16 - 1.0])
    boxes = torch.cat((corners.flatten(1), torch.tensor([[0.0, 0, 255, 79], [9, 9, 9, 9]])))
    images = torch.arange(len(boxes)) % 2
    exact = roi_align_by_tensors(features, boxes, images, 7, 1 / 16, 0, aligned)
    found = roi_align_by_tensors(features, boxes, images, 7, 1 / 16, 0, aligned, within=True)
    torch.testing.assert_close(found, exact)


def test_gradient_is_that_of_the_sums_and_an_empty_set_keeps_the_graph() -> None:
    features = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes, images = torch.tensor(BOXES[:3], dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda maps: roi_align_by_tensors(maps, boxes, images, 2, 1 / 16), features)
    nothing = roi_align(features, boxes[:0], images[:0], 2, 1 / 16)
    assert nothing.shape == (0, 2, 2, 2)
    nothing.sum().backward()
    assert features.grad is not None and not features.grad.any()


@pytest.mark.skipif(not has_compiled_operators(), reason="torchvision's operators do not load beside this torch")
@pytest.mark.parametrize("aligned", [False, True])
def test_torchvision_gives_the_same(aligned: bool) -> None:
    features, boxes = torch.randn(2, 3, 5, 6), torch.tensor(BOXES)
    images = torch.arange(len(BOXES)) % 2
    ours = roi_align_by_tensors(features, boxes, images, 7, 1 / 16, 0, aligned)
    torch.testing.assert_close(roi_align(features, boxes, images, 7, 1 / 16, 0, aligned), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_boxes_that_are_not_finite_end_nothing(value: str) -> None:
    boxes = torch.tensor([[0.0, 0.0, float(value), 4.0], [1.0, 1.0, 3.0, 3.0]])
    features, images = torch.randn(1, 2, 8, 8), torch.zeros(2, dtype=torch.int64)
    found = roi_align(features, boxes, images, 2, 1.0, 2, aligned=True)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1:], roi_align(features, boxes[1:], images[1:], 2, 1.0, 2, aligned=True))
