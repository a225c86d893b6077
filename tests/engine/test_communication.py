"""Format in which gradients cross ranks, in real engines."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_cross_in_float32_lose_no_bit(
    in_engines: Callable[[str], dict[tuple[int, int], Any]], stage: int
) -> None:
    for found in in_engines("tests.engine.communication_program").values():
        assert (found[stage, "fp32"], found[stage, "bf16"]) == (-128.5, -128.0)
