"""Exit codes of the commands that are no run, and the one place that tells errors apart by them."""

import argparse
import sys
from collections.abc import Callable, Sequence

from pretrain.errors import RecipeError, TubeletError
from pretrain.runtime.terminal import take_any_name

DONE, FAILED, USAGE = 0, 1, 2


def run_command(
    name: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], object]
) -> int:
    """Do what a command line asks for: 0 done, 1 failed, 2 wrong usage; argparse leaves with 2 by itself.

    Args:
        name: of the command; what went wrong is told in lines behind it.
        parser: of its options.
        argv: words; None: of this process.
        work: what is to be done.
    """
    take_any_name()
    arguments = parser.parse_args(argv)
    try:
        work(arguments)
    except TubeletError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE if isinstance(error, RecipeError) else FAILED
    return DONE
