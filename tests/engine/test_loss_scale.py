"""What limits on gradients inside a network are told before a forward pass."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.engine.step import tell_scale
from pretrain.models.dropout import Rows
from pretrain.models.gradient_limits import LossScale


@pytest.mark.parametrize(("fp16", "expected"), [(True, 65536.0), (False, 1.0)])
def test_scale_and_rows(fp16: bool, expected: float) -> None:
    """In other formats DeepSpeed's optimisers have a scale too, which nothing is multiplied by."""
    scale, optimizer = LossScale(7.0, 7), SimpleNamespace(loss_scale=65536.0)
    engine = SimpleNamespace(fp16_enabled=lambda: fp16, optimizer=optimizer)
    tell_scale(scale, engine, Rows(torch.zeros(4, dtype=torch.int64)), accumulation=3)
    assert scale == LossScale(expected, 12)
    tell_scale(scale, engine, Rows(), accumulation=3)
    assert scale.rows is None and scale.limit(0.5, 128) == 0.5 * expected


def test_a_limit_is_for_a_mean_over_rows() -> None:
    assert LossScale(1.0, 32).limit(0.1, 128) == pytest.approx(0.4)
    assert LossScale(8.0, 128).limit(0.1, 128) == pytest.approx(0.8)
