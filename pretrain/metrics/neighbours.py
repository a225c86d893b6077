"""Nearest neighbours: no training, so a direct look at the features."""

import torch
from torch import Tensor
from torch.nn import functional as F

#: Neighbours and temperature of the vote (Wu et al. 2018, as in DINO's evaluation).
NEIGHBOURS = 20
TEMPERATURE = 0.07
#: Queries compared at once.
CHUNK = 1024


def knn_scores(train: Tensor, targets: Tensor, queries: Tensor, classes: int, neighbours: int = NEIGHBOURS) -> Tensor:
    """Count votes [n, classes] of the nearest training features, by cosine similarity, weighted exp(similarity / 0.07).

    Args:
        train: features [m, C].
        targets: their classes, int64 [m].
        queries: features [n, C].
        classes: number of classes.
        neighbours: how many vote; all where there are fewer.
    """
    train, queries = F.normalize(train.float(), dim=1), F.normalize(queries.float(), dim=1)
    votes = [_votes(chunk @ train.t(), targets, classes, min(neighbours, len(train))) for chunk in queries.split(CHUNK)]
    return torch.cat(votes)


def leave_one_out_scores(features: Tensor, targets: Tensor, classes: int, neighbours: int = NEIGHBOURS) -> Tensor:
    """Score every feature [m, C] among all the others as `knn_scores` does: nobody votes for itself."""
    unit, votes = F.normalize(features.float(), dim=1), []
    for start in range(0, len(unit), CHUNK):
        similarity = unit[start : start + CHUNK] @ unit.t()
        similarity.diagonal(start).fill_(float("-inf"))
        votes.append(_votes(similarity, targets, classes, min(neighbours, len(unit) - 1)))
    return torch.cat(votes)


def _votes(similarity: Tensor, targets: Tensor, classes: int, neighbours: int) -> Tensor:
    nearest, index = similarity.topk(neighbours, dim=1)
    weight = (nearest / TEMPERATURE).exp()
    return torch.zeros(len(similarity), classes).scatter_add_(1, targets[index], weight)
