"""Retrieval scores beside a loop over sorted lists; ties, NaN, several right answers, and what is refused."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.errors import DataError
from pretrain.metrics.retrieval import class_retrieval, cosine_ranks, dual_softmax, first_ranks, retrieval_scores

NAN, INF = float("nan"), float("inf")


def made(queries: int, candidates: int, levels: int) -> Tensor:
    """Similarities of a few levels, so that ties abound."""
    numbers = torch.randint(levels, (queries, candidates), generator=torch.Generator().manual_seed(4))
    return numbers / levels - 0.5


def looped_rank(row: list[float], right: int, ties: str) -> float:
    """Sorts, then looks where the right candidate's similarity stands, as the official code does."""
    places = [place for place, value in enumerate(sorted(row, reverse=True)) if value == row[right]]
    return {"best": places[0], "worst": places[-1], "mean": float(np.mean(places))}[ties]


@pytest.mark.parametrize("ties", ["best", "mean", "worst"])
def test_scores_are_those_of_a_loop(ties: Any) -> None:
    similarity, truth = made(40, 13, 6), torch.arange(40) % 13
    ranks = np.array([looped_rank(row.tolist(), n % 13, ties) for n, row in enumerate(similarity)])
    found = retrieval_scores(similarity, truth, ties, at=(1, 5, 10, 50))
    expected = {1: 100 * np.mean(ranks == 0)} | {k: 100 * np.mean(ranks < k) for k in (5, 10, 50)}
    assert found.recall == pytest.approx(expected) and found.recall[50] == 100 and found.queries == 40
    assert found.median_rank == pytest.approx(np.median(ranks) + 1)
    assert found.mean_rank == pytest.approx(np.mean(ranks) + 1)
    assert found.geometric_mean == pytest.approx(math.prod(expected[k] for k in (1, 5, 10)) ** (1 / 3))
    assert found.named("text_to_video")["text_to_video_R@5"] == found.recall[5]
    assert found.named()["median_rank"] == found.median_rank


def test_ties_of_two_are_first_middle_or_second() -> None:
    """At the first place, where the mean of 0 and 1 is no hit, and at the fifth, where 4.5 is one; as officially."""
    tied = torch.tensor([[0.5, 0.5, 0.1, 0, 0, 0], [0.9, 0.8, 0.7, 0.6, 0.5, 0.5]])
    truth = torch.tensor([1, 4])
    found = {ties: retrieval_scores(tied, truth, ties, (1, 5)).recall for ties in ("best", "mean", "worst")}  # type: ignore[arg-type]
    assert found == {"best": {1: 50, 5: 100}, "mean": {1: 0, 5: 100}, "worst": {1: 0, 5: 50}}


@pytest.mark.parametrize(
    ("row", "right", "rank"),
    [
        ([0.1, NAN, 0.2], 2, 1),
        ([0.1, NAN, 0.2], 1, 3),
        ([NAN, NAN, NAN], 0, 3),
        ([INF, 0.3, 0.2], 0, 3),
        ([INF, 0.3, 0.2], 1, 1),
        ([-INF, 0.3, -INF], 1, 0),
        ([-INF, 0.3, -INF], 0, 3),
    ],
)
def test_a_broken_network_finds_nothing(row: list[float], right: int, rank: int) -> None:
    for ties in ("best", "mean", "worst"):
        found = retrieval_scores(torch.tensor([row]), torch.tensor([right]), ties, (1, 3, 50))  # type: ignore[arg-type]
        assert found.mean_rank == rank + 1
        assert found.recall == {1: 100.0 * (rank == 0), 3: 100.0 * (rank < 3), 50: 100.0 * (rank < 3)}


@pytest.mark.parametrize("ties", ["best", "mean", "worst"])
def test_the_first_of_several_right_ones_counts(ties: Any) -> None:
    """Among ties the mean over all orders; a class that no candidate has is never found."""
    values, labels = [0.7, 0.7, 0.7, 0.9, 0.1, 0.7], [1, 0, 1, 2, 1, 2]
    every = [
        next(place for place, at in enumerate(order) if labels[at] == 1)
        for order in itertools.permutations(range(6))
        if [values[at] for at in order] == sorted(values, reverse=True)
    ]
    wanted = {"best": min(every), "mean": float(np.mean(every)), "worst": max(every)}[ties]
    rows, tags = torch.tensor([values, values]), torch.tensor(labels)
    relevant = torch.tensor([1, 7])[:, None] == tags
    assert first_ranks(rows, relevant, ties).tolist() == pytest.approx([wanted, 6])
    found = class_retrieval(rows, torch.tensor([1, 7]), tags, (1, 5), ties)
    assert found.mean_rank == pytest.approx((wanted + 6) / 2 + 1) and found.recall[5] == 50


def test_a_class_is_not_found_by_what_was_taken_out() -> None:
    """Leave-one-out: the query itself has minus infinity."""
    rows = torch.tensor([[1.0, 0.2, 0.5], [0.2, 1.0, 0.1], [0.5, 0.1, 1.0]]).fill_diagonal_(-INF)
    labels = torch.tensor([0, 0, 1])
    assert class_retrieval(rows, labels, labels, at=(1, 2)).recall == pytest.approx({1: 100 / 3, 2: 200 / 3})


def test_pieces_are_the_whole_matrix() -> None:
    queries, candidates = torch.randn(2500, 6), torch.randn(40, 6) * torch.arange(1, 41)[:, None]
    labels, wanted = torch.arange(40) % 7, torch.arange(2500) % 7
    similarity = torch.nn.functional.cosine_similarity(queries[:, None], candidates[None], dim=-1)
    expected = first_ranks(similarity, wanted[:, None] == labels)
    assert (cosine_ranks(queries, candidates, wanted, labels) == expected).double().mean() > 0.999, "but for rounding"


def test_dual_softmax_takes_back_what_is_near_to_all() -> None:
    """A hub, the third candidate, is the nearest of every query; with the softmax over queries none's."""
    similarity = torch.tensor([[0.8, 0.1, 0.9], [0.1, 0.7, 0.9], [0.2, 0.2, 0.95]])
    assert retrieval_scores(similarity, torch.arange(3)).recall[1] == pytest.approx(100 / 3)
    weighed = dual_softmax(similarity, 0.1)
    assert retrieval_scores(weighed, torch.arange(3)).recall[1] == 100
    column = [math.exp(float(value) / 0.1) for value in similarity[:, 0]]
    assert float(weighed[1, 0]) == pytest.approx(0.1 * column[1] / sum(column), rel=1e-5)


@pytest.mark.parametrize(
    ("similarity", "truth", "options", "words"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, "truth from 0 to 3; allowed: columns 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0]), {}, r"\[2, 3\], truth of shape \[1\]"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), {}, "at least one query"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), {"ties": "first"}, "'first', allowed: best, mean, worst"),
    ],
)
def test_what_does_not_fit_is_refused(similarity: Tensor, truth: Tensor, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        retrieval_scores(similarity, truth, **options)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 candidates, but labels of shape \[2\]"):
        class_retrieval(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2))
