"""The command line of launch/pretrain.py."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain.commands.program import Program, run_program
from pretrain.recipe.schema import Recipe

if TYPE_CHECKING:
    from pretrain.objectives.base import Method

EXAMPLES = """\
examples:
  deepspeed launch/pretrain.py --recipe vit_b_dual
      train on every accelerator of this machine; the same command again continues where the run stopped
  deepspeed launch/pretrain.py --recipe vit_b_dual data.root=s3://bucket/video batch.micro=16 run.name=first
      read shards from elsewhere, smaller forward passes, another run folder (runs/first)
  python launch/pretrain.py --recipe vit_g_dual --dry-run
      parameters, cost, batch, learning rate, schedule, data and memory; no accelerator needed
  python launch/pretrain.py --recipe ./mine.yaml --print
      the resolved recipe, each key with its meaning and unit; itself a recipe

exit codes: 0 done, 1 failed, 2 wrong recipe or usage, 75 stopped on purpose: start the same command again
recipes and keys: docs/recipes.md
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_program(PROGRAM, argv)


def _run(method: "Method", arguments: argparse.Namespace) -> int:
    # Here and not above: --print, --check and --dry-run answer without loading deepspeed.
    from pretrain.engine.loop import train

    return train(method, resume=arguments.resume)


PROGRAM = Program("pretrain.py", "Pre-train a video model as a recipe says.", EXAMPLES, schema=Recipe, run=_run)


if __name__ == "__main__":
    sys.exit(main())
