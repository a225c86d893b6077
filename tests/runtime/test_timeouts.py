"""Timeouts of collectives reach the groups that DeepSpeed makes."""

from collections.abc import Callable
from typing import Any

from tests.runtime import timeouts_program as program


def test_every_group_has_the_timeout(in_engines: Callable[[str], dict[tuple[int, int], Any]]) -> None:
    for found in in_engines("tests.runtime.timeouts_program").values():
        assert len(found) >= 3 and set(found) == {program.TIMEOUT_S}, found
