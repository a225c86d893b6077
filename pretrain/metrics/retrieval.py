"""Retrieval: how far up a list what belongs to a query stands, with the published rules for ties.

R@k, median and mean rank as in TVTSv2 and the code that it comes from (Frozen in Time, Collaborative Experts);
systems/tvtsv2.md, section 6. A query is a row, a candidate a column.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.errors import DataError

#: Rank of a candidate that others equal: the best, the mean or the worst place among them. TVTSv2: text to video takes
#: the best, video to text the mean.
Ties = Literal["best", "mean", "worst"]
#: Ranks of which the geometric mean of R@k is taken.
GEOMETRIC = (1, 5, 10)
#: Queries compared at once.
CHUNK = 1024


@dataclass(frozen=True)
class RetrievalScores:
    """Scores of a set of queries.

    Attributes:
        recall: by k, percent of queries whose rank is among the first k.
        median_rank: counted from 1; of an even number of queries the mean of the two in the middle.
        mean_rank: counted from 1.
        geometric_mean: of R@1, R@5 and R@10; 0 where one of them is.
        queries: how many.
    """

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    geometric_mean: float
    queries: int

    def named(self, direction: str = "") -> dict[str, float]:
        """Give the numbers by name, as logs and tables have them; `direction` comes first: text_to_video_R@1."""
        start = f"{direction}_" if direction else ""
        found = {f"R@{k}": value for k, value in self.recall.items()}
        found |= {"median_rank": self.median_rank, "mean_rank": self.mean_rank, "geometric_mean": self.geometric_mean}
        return {f"{start}{name}": value for name, value in found.items()}


def retrieval_scores(
    similarity: Tensor, truth: Tensor, ties: Ties = "best", at: Sequence[int] = (1, 5, 10, 50)
) -> RetrievalScores:
    """Score queries that one candidate each belongs to.

    Args:
        similarity: float [Q, N].
        truth: column of each query's candidate, int64 [Q].
        ties: place of the right candidate among others of the same similarity.
        at: the k of R@k.

    Raises:
        DataError: shapes that don't fit, no queries, columns that there are not, an unknown rule for ties.
    """
    _check(similarity, truth, similarity.shape[-1], "truth")
    relevant = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, truth[:, None], True)
    return scores_of_ranks(first_ranks(similarity, relevant, ties), similarity.shape[1], at)


def class_retrieval(
    similarity: Tensor,
    query_labels: Tensor,
    labels: Tensor,
    at: Sequence[int] = (1, 5, 10, 50),
    ties: Ties = "best",
) -> RetrievalScores:
    """Score queries by the first candidate of their own class: R@k counts those with one among the first k.

    Also for several texts of one video: a video's number is then its texts' label. A query whose class no candidate has
    is never right.

    Args:
        similarity: float [Q, N]; minus infinity where a candidate must not be found (the query itself).
        query_labels: int64 [Q].
        labels: of the candidates, int64 [N].
        at, ties: as for `retrieval_scores`.
    """
    if labels.shape != similarity.shape[-1:]:
        raise DataError(f"retrieval: {similarity.shape[-1]} candidates, but labels of shape {list(labels.shape)}")
    _check(similarity, query_labels, None, "query_labels")
    ranks = first_ranks(similarity, query_labels[:, None] == labels, ties)
    return scores_of_ranks(ranks, len(labels), at)


def first_ranks(similarity: Tensor, relevant: Tensor, ties: Ties = "best") -> Tensor:
    """Find the rank of the first relevant candidate of each query, counted from 0.

    Similarities that are not finite are never right, and NaN counts as put before all others: a broken network would
    else find everything. A query without a relevant candidate that is finite has the rank N.

    Args:
        similarity: float [Q, N].
        relevant: bool [Q, N].
        ties: place among candidates that equal the first relevant one: the best or worst of them, or their mean, which
            with several relevant ones is the mean over all orders.

    Returns:
        float64 [Q], fractions with the mean.
    """
    if ties not in get_args(Ties):
        raise DataError(f"retrieval: found ties={ties!r}, allowed: {', '.join(get_args(Ties))}")
    usable = relevant & similarity.isfinite()
    best = similarity.masked_fill(~usable, -torch.inf).amax(1, keepdim=True)
    # Not `>`: what is NaN counts as put before.
    above = (~(similarity <= best) & ~relevant).sum(1).double()
    equal = similarity == best
    others, right = (equal & ~relevant).sum(1), (equal & usable).sum(1)
    if ties == "mean":
        above += others / (right + 1)
    elif ties == "worst":
        above += others
    return torch.where(usable.any(1), above, float(similarity.shape[1]))


def cosine_ranks(
    queries: Tensor, candidates: Tensor, query_labels: Tensor, labels: Tensor, ties: Ties = "best"
) -> Tensor:
    """Find `first_ranks` [Q] by the cosine of embeddings, some queries at a time: for sets too large for one matrix.

    Args:
        queries: float [Q, D].
        candidates: float [N, D].
        query_labels, labels: int64 [Q] and [N]; what has the same belongs together.
        ties: as for `first_ranks`.
    """
    known, unit = F.normalize(candidates.float(), dim=1), F.normalize(queries.float(), dim=1)
    pairs = zip(unit.split(CHUNK), query_labels.split(CHUNK), strict=True)
    return torch.cat([first_ranks(some @ known.T, wanted[:, None] == labels, ties) for some, wanted in pairs])


def dual_softmax(similarity: Tensor, temperature: float = 1.0) -> Tensor:
    """Weigh similarities [Q, N] by a softmax over queries: a candidate that all queries are near to counts less.

    Dual softmax (Cheng et al., "Improving Video-Text Retrieval by Multi-Stream Corpus Alignment and Dual Softmax Loss",
    2021) at test time, the rows marked with a dagger of TVTSv2's table, whose code does not have it: temperature and
    axis are the usual form. It looks at all queries at once, which a search engine could not.

    Args:
        similarity: of queries to candidates; transpose it for the other direction.
        temperature: of the softmax; CLIP's similarities, times 100, have been used with 1.
    """
    return similarity * (similarity / temperature).softmax(0)


def scores_of_ranks(ranks: Tensor, candidates: int, at: Sequence[int] = (1, 5, 10, 50)) -> RetrievalScores:
    """Score queries by their `first_ranks` [Q] among N candidates; a set too large for one matrix is made in pieces."""

    def recall(k: int) -> float:
        # As officially: first means rank 0 alone, so that a tie in the middle of two is none; among the first five is
        # 4.5. What is never found has the rank N, and is not among the first 50 of 10 either.
        found = ranks == 0 if k == 1 else ranks < min(k, candidates)
        return 100 * float(found.double().mean())

    geometric = math.prod(recall(k) for k in GEOMETRIC) ** (1 / len(GEOMETRIC))
    # Not torch.median, which takes the lower of the two in the middle.
    ordered, count = ranks.sort().values, len(ranks)
    median = float(ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    mean = float(ranks.mean())
    return RetrievalScores({k: recall(k) for k in at}, median + 1, mean + 1, geometric, count)


def _check(similarity: Tensor, queries: Tensor, candidates: int | None, name: str) -> None:
    if similarity.dim() != 2 or queries.shape != similarity.shape[:1] or not len(queries):
        raise DataError(
            f"retrieval: similarity of shape {list(similarity.shape)}, {name} of shape {list(queries.shape)}; allowed: "
            "[Q, N] and [Q], at least one query"
        )
    if candidates is not None and not bool(((queries >= 0) & (queries < candidates)).all()):
        raise DataError(
            f"retrieval: {name} from {int(queries.min())} to {int(queries.max())}; allowed: columns 0 to "
            f"{candidates - 1}, the number of each query's candidate"
        )
