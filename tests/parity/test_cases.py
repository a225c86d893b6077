"""The finder itself, and a line for every case that nothing can run yet."""

import ast
from pathlib import Path

import pytest


def test_every_built_kind_has_a_test_module(built_kinds: set[str]) -> None:
    """A kind known to the finder but tested nowhere would pass unseen."""
    covered: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "KINDS":
                covered |= set(ast.literal_eval(node.value))
    assert covered == built_kinds


def test_unbuilt(unbuilt_case) -> None:  # noqa: ANN001
    pytest.skip(f"{unbuilt_case.name}: nothing here is built for {unbuilt_case.system!r} yet")
