"""Scores of masks: counted by hand, added up, and equal to torchmetrics'."""

import math

import pytest
import torch
from torch import Tensor

from pretrain.errors import DataError
from pretrain.metrics.segmentation import NO_CLASS, segmentation_confusion, segmentation_scores
from pretrain.runtime.vision_ops import ensure_torchvision

CLASSES = 5


def drawn(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Labels, some of no class, and predictions that are right more often than not."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.randint(CLASSES, shape, generator=rng)
    other = torch.randint(CLASSES, shape, generator=rng)
    found = torch.where(torch.rand(shape, generator=rng) < 0.6, truth, other)
    return torch.where(torch.rand(shape, generator=rng) < 0.1, NO_CLASS, truth), found


def test_counted_by_hand() -> None:
    """Four pixels of class 0, one of them missed and one of no prediction; a class that is never there."""
    truth = torch.tensor([[0, 0, 0], [0, 1, NO_CLASS]])
    found = torch.tensor([[0, 0, 1], [NO_CLASS, 1, 0]])
    counts = segmentation_confusion(truth, found, 3)
    assert counts.tolist() == [[2, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    scores = segmentation_scores(counts)
    assert scores.iou[:2].tolist() == [2 / 4, 1 / 2] and math.isnan(scores.iou[2])
    assert scores.accuracy[:2].tolist() == [2 / 4, 1] and math.isnan(scores.accuracy[2])
    assert (scores.mean_iou, scores.mean_accuracy, scores.pixel_accuracy) == (0.5, 0.75, 3 / 5)


def test_a_class_that_is_only_predicted_counts_as_missed() -> None:
    scores = segmentation_scores(segmentation_confusion(torch.tensor([0, 0]), torch.tensor([0, 1]), 2))
    assert scores.iou.tolist() == [0.5, 0] and scores.mean_iou == 0.25 and scores.mean_accuracy == 0.5


def test_nothing_labelled_has_no_score() -> None:
    scores = segmentation_scores(segmentation_confusion(torch.tensor([NO_CLASS]), torch.tensor([1]), 2))
    assert math.isnan(scores.mean_iou) and math.isnan(scores.pixel_accuracy)


def test_parts_add_up() -> None:
    truth, found = drawn(0, 4, 9, 7)
    parts = [segmentation_confusion(*one, CLASSES) for one in zip(truth, found, strict=True)]
    assert torch.equal(sum(parts, torch.zeros_like(parts[0])), segmentation_confusion(truth, found, CLASSES))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_equal_to_torchmetrics(seed: int) -> None:
    ensure_torchvision()  # which torchmetrics imports
    classification = pytest.importorskip("torchmetrics.functional.classification")
    truth, found = drawn(seed, 2, 17, 23)
    scores = segmentation_scores(segmentation_confusion(truth, found, CLASSES))
    options = {"num_classes": CLASSES, "ignore_index": NO_CLASS}

    def near(value: float | Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(torch.as_tensor(value).float(), expected.float(), rtol=1e-6, atol=1e-7)

    near(scores.iou, classification.multiclass_jaccard_index(found, truth, average="none", **options))
    near(scores.mean_iou, classification.multiclass_jaccard_index(found, truth, average="macro", **options))
    near(scores.accuracy, classification.multiclass_accuracy(found, truth, average="none", **options))
    near(scores.mean_accuracy, classification.multiclass_accuracy(found, truth, average="macro", **options))
    near(scores.pixel_accuracy, classification.multiclass_accuracy(found, truth, average="micro", **options))


@pytest.mark.parametrize(
    ("truth", "found", "told"),
    [
        ([0, 5], [0, 0], "labels from 0 to 5; allowed: 0 to 4, and -1"),
        ([0, 1], [0, -2], "predictions from -2 to 0; allowed: 0 to 4, and -1"),
        ([0, 1, 2], [0, 1], r"labels of shape \[3\], predictions of \[2\]"),
    ],
)
def test_what_is_no_class_is_named(truth: list[int], found: list[int], told: str) -> None:
    with pytest.raises(DataError, match=told):
        segmentation_confusion(torch.tensor(truth), torch.tensor(found), CLASSES)
