"""Parts of a step that torch.compile must leave alone."""

import functools
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

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    # torch hangs what it made on the function at its first call, and a method that is bound takes no attribute.
    kept: Callable[P, T] = _disable_dynamo(plain)
    return kept
