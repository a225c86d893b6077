"""Parts of a step that torch.compile must leave alone."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Keep the compiler out of a function and all that it calls.

    As `torch.compiler.disable`, which loads the compiler at the line where it stands: 1.4 s of every command's start.
    This one, torch's own for its optimisers, waits for the first call.
    """
    kept: Callable[P, T] = _disable_dynamo(function)
    return kept
