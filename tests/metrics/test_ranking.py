"""Accuracies of scores that are NaN, infinite, tied or all the same, by every way that counts them."""

import pytest
import torch

from pretrain.metrics.neighbours import knn_scores, leave_one_out_scores
from pretrain.metrics.ranking import accuracy, predicted, ranks

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([0.1, 0.7, 0.2], 1, 0),
        ([0.1, 0.7, 0.2], 2, 1),
        ([0.1, 0.7, 0.2], 0, 2),
        ([0.5, 0.5, 0.5], 0, 1),  # of three equal ones the middle, whichever is right
        ([0.5, 0.5, 0.5], 2, 1),
        ([0.5, 0.5, 0.1], 1, 0),
        ([NAN, NAN, NAN], 1, 3),
        ([0.1, NAN, 0.2], 1, 3),
        ([NAN, 0.7, 0.2], 1, 1),
        ([0.1, INF, 0.2], 1, 3),
        ([INF, 0.7, 0.2], 1, 1),
        ([-INF, 0.7, -INF], 1, 0),
    ],
)
def test_rank_of_the_right_class(scores: list[float], target: int, rank: int) -> None:
    assert ranks(torch.tensor([scores]), torch.tensor([target])).tolist() == [rank]
    assert accuracy(torch.tensor([scores]), torch.tensor([target])) == (100 if rank == 0 else 0)


def test_a_prediction_with_nan_is_none() -> None:
    assert predicted(torch.tensor([[0.1, 0.7], [NAN, 0.7], [-INF, INF]])).tolist() == [1, -1, 1]


@pytest.mark.parametrize("value", [NAN, INF])
def test_neighbours_of_a_broken_network_are_never_right(value: float) -> None:
    targets = torch.arange(12) % 3
    features = torch.eye(3)[targets] + 0.01 * torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert accuracy(leave_one_out_scores(features, targets, 3, 3), targets) == 100
    broken = torch.full_like(features, value)
    assert accuracy(leave_one_out_scores(broken, targets, 3, 3), targets) == 0
    assert accuracy(knn_scores(broken, targets, broken, 3, 3), targets) == 0
    assert accuracy(knn_scores(features, targets, broken, 3, 3), targets) == 0


def test_neighbours_of_a_collapsed_network_are_right_by_chance() -> None:
    targets = torch.arange(12) % 3
    assert accuracy(knn_scores(torch.ones(12, 3), targets, torch.ones(12, 3), 3, 12), targets) <= 34
