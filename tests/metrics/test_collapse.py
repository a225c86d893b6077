"""Signs of collapse of features whose rank, spread and entropy are known."""

import math

import pytest
import torch

from pretrain.metrics.collapse import effective_rank, feature_deviation, weight_entropy


def normal(rows: int, channels: int) -> torch.Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_directions_are_counted(rank: int) -> None:
    """As many orthogonal directions of one length, turned in 8 dimensions and shown at several places."""
    turn = torch.linalg.qr(normal(8, 8)).Q
    features = 5 * (torch.eye(8)[torch.arange(48) % rank] @ turn)
    assert float(effective_rank(features)) == pytest.approx(rank, rel=1e-4)
    assert float(effective_rank(features.bfloat16())) == pytest.approx(rank, rel=0.1)


def test_uneven_directions_count_by_entropy() -> None:
    features = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert float(effective_rank(features)) == pytest.approx(expected, rel=1e-4)
    shifted = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)) * 0.01 + 7
    assert float(effective_rank(shifted)) < 1.1, "not centred: one direction holds nearly all"


def test_spread_is_one_on_the_sphere_and_zero_at_a_point() -> None:
    even = normal(4000, 16)
    assert float(feature_deviation(even)) == pytest.approx(1, abs=0.02)
    assert float(feature_deviation(even * torch.linspace(1, 90, 4000)[:, None])) == pytest.approx(1, abs=0.02)
    assert float(feature_deviation(normal(1, 16).expand(9, 16) * torch.arange(1, 10)[:, None])) < 1e-3
    assert float(feature_deviation(torch.zeros(4, 3))) == 0


def test_entropy_of_weights() -> None:
    rows = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    assert weight_entropy(rows).tolist() == pytest.approx([1, 0, 0.5, 0], abs=1e-6)
    assert weight_entropy(torch.rand(5, 1)).tolist() == [0] * 5 and weight_entropy(torch.zeros(2, 0)).shape == (2,)
    assert not weight_entropy(rows.requires_grad_()).requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_features_give_nan_and_no_error(value: float) -> None:
    features = normal(6, 4)
    features[2, 1] = value
    assert math.isnan(effective_rank(features)) and math.isnan(feature_deviation(features))
    assert float(effective_rank(torch.zeros(5, 3))) == pytest.approx(1, abs=1e-4)
