"""Signs of collapse, which a contrastive loss hides: how many directions features use, and how they spread.

Pure functions of tensors, without gradient, for monitors of a run. Features that are not finite give NaN, and never an
error in the middle of a run.
"""

import math

import torch
from torch import Tensor

#: Added to each share of the singular values, as published for float32.
RANK_EPS = 1e-7


@torch.no_grad()
def effective_rank(features: Tensor, eps: float = RANK_EPS) -> Tensor:
    """Compute RankMe: the exponential of the entropy of the singular values' shares (Garrido et al. 2023, equation 1).

    From 1, where all features lie on a line through 0, to min(n, C), where they spread evenly. Features are taken as
    they are: neither centred nor of unit length.

    Args:
        features: [n, C]; by the paper 25,600 suffice for a dimension of 2,048.
        eps: added to each share.

    Returns:
        float32, a scalar.
    """
    values = features.float()
    finite = values.isfinite().all()
    # The decomposition raises on what is not finite.
    singular = torch.linalg.svdvals(values.nan_to_num(0.0, 0.0, 0.0))
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float32).tiny) + eps
    return torch.where(finite, (-(shares * shares.log()).sum()).exp(), math.nan)


@torch.no_grad()
def feature_deviation(features: Tensor) -> Tensor:
    """Compute the deviation of unit-length features, mean over channels, times the root of their number.

    1 where they spread evenly over the sphere, 0 where all are the same (Chen and He, "Exploring Simple Siamese
    Representation Learning", 2021, section 4.1, whose 1 / sqrt(C) is 1 here).

    Args:
        features: [n, C], n at least 2.

    Returns:
        float32, a scalar.
    """
    values = features.float()
    unit = values / values.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit.std(0, correction=0).mean() * math.sqrt(values.shape[1])


@torch.no_grad()
def weight_entropy(weights: Tensor) -> Tensor:
    """Compute the entropy of each row of weights, as a share of the largest possible one.

    1: all K weigh the same, 0: one has all. Rows are divided by their sum; one without any weight, or K = 1, gives 0.

    Args:
        weights: [..., K], 0 or more.

    Returns:
        float32 [...].
    """
    values = weights.float()
    if values.shape[-1] < 2:
        return values.sum(-1) * 0
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # xlogy: 0 log 0 is 0.
    return -torch.xlogy(shares, shares).sum(-1) / math.log(values.shape[-1])
