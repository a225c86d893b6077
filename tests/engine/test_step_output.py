"""What an objective may return: one error that says what it was, before anything is computed with it."""

from typing import Any

import pytest
import torch

from pretrain.engine.step import check_output
from pretrain.errors import TrainingError
from pretrain.objectives.base import Output

LOSS = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (LOSS, "returned Tensor, allowed: objectives.base.Output"),
        ({"loss": LOSS}, "returned dict"),
        (Output(torch.ones(3), {}), r"loss is a tensor of shape \[3\], allowed: a tensor of one number"),
        (Output(LOSS, {"accuracy": [0.5, 1.0]}), r"accuracy is \[0.5, 1.0\]"),
        (Output(LOSS, {"accuracy": torch.empty(0)}), r"accuracy is a tensor of shape \[0\]"),
    ],
)
def test_what_is_no_output(output: Any, told: str) -> None:
    with pytest.raises(TrainingError, match=told):
        check_output(output)


def test_what_is_one() -> None:
    check_output(Output(LOSS.reshape(1), {"accuracy": LOSS}))
