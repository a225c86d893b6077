"""Command line of launch/finetune.py: pre-training's, and testing."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.recipe import TuneRecipe
from pretrain.commands.program import Program, run_program

if TYPE_CHECKING:
    from pretrain.objectives.base import Method

EXAMPLES = """\
examples:
  deepspeed launch/finetune.py --recipe vit_b_k400 run.init_weights=vit_b_hybrid_pt_800e.pth
      fine-tune on every accelerator of this machine, then test; the same command again continues where it stopped
  python launch/finetune.py --recipe ./mine.yaml run.init_weights=runs/mine/checkpoints/step_00012000
      one process; start from a checkpoint of launch/pretrain.py
  deepspeed launch/finetune.py --recipe vit_b_k400 --test best evaluate.clips=10
      test the best checkpoint of a run again, with more clips
  python launch/finetune.py --rescore runs/vit_b_k400/predictions/step_00090000
      accuracy, per-class table and confusion matrix from stored predictions, without the model
  python launch/finetune.py --compare runs/vit_b_k400 runs/scratch
      tested runs side by side: what was trained, accuracy, chance
  python launch/finetune.py --ensemble runs/tdn_8f runs/tdn_16f
      tests of several models together: the mean of their probabilities, or --merge clamped as TDN's released numbers

exit codes: 0 done, 1 failed, 2 wrong recipe or usage, 75 stopped on purpose: start the same command again
guide: docs/finetuning.md
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Looked for before parsing: the program asks for a recipe, which these don't have.
    if {"--rescore", "--compare", "--ensemble"} & set(words):
        return _read_only(words)
    return run_program(PROGRAM, words)


def _read_only(words: list[str]) -> int:
    """Score or compare finished tests; needs neither recipe nor model."""
    from finetune.classification.ensemble import ensemble
    from finetune.classification.testing import rescore
    from finetune.commands.compare import compare
    from pretrain.errors import RecipeError, TubeletError

    parser = argparse.ArgumentParser(prog="finetune.py", description="Score or compare what was tested.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rescore", metavar="FOLDER", type=Path, help="folder with predictions.json")
    what.add_argument("--compare", metavar="RUN", type=Path, nargs="+", help="folders of tested runs")
    what.add_argument("--ensemble", metavar="RUN", type=Path, nargs="+", help="runs or folders with predictions.json")
    merge = "with --ensemble: mean of probabilities, or sum of raw logits without the negative ones (TDN as released)"
    parser.add_argument("--merge", choices=("probabilities", "clamped"), default="probabilities", help=merge)
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="with --ensemble: write the joint predictions there")
    # The deepspeed launcher puts it in front of all arguments, whatever it starts.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.rescore:
            rescore(arguments.rescore)
        elif arguments.ensemble:
            ensemble(arguments.ensemble, arguments.merge, arguments.out)
        else:
            print("\n".join(compare(arguments.compare)))
    except TubeletError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    return 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--test",
        metavar="last|best|PATH",
        help="test this checkpoint of the run (clips x crops) without training",
    )
    parser.add_argument("--rescore", metavar="FOLDER", help="score stored predictions again; needs no recipe")
    parser.add_argument("--compare", metavar="RUN", nargs="+", help="tested runs side by side; needs no recipe")
    parser.add_argument(
        "--ensemble",
        metavar="RUN",
        nargs="+",
        help="tests of several models together; needs no recipe, takes --merge probabilities|clamped and --out FOLDER",
    )


def _run(method: "Method", arguments: argparse.Namespace) -> int:
    """Train, then test; or test only. One process group serves both."""
    from pretrain.engine.loop import train
    from pretrain.errors import RecipeError
    from pretrain.runtime.logging import set_up_logging
    from pretrain.runtime.process_group import join, leave

    ranks = join()
    try:
        if arguments.test is not None:
            set_up_logging(ranks.rank, Path(method.recipe.run.dir).absolute() / "logs")
            if method.test(ranks, arguments.test) is None:
                raise RecipeError(f"--test: objective.name={method.recipe.objective.name} has no test")
            return 0
        code = train(method, resume=arguments.resume)
        # Not after 75: the start that finishes the run tests it.
        if code == 0:
            method.test(ranks)
        return code
    finally:
        leave(ranks)


PROGRAM = Program(
    name="finetune.py",
    description="Fine-tune a pre-trained video model as a recipe says, and test it.",
    epilog=EXAMPLES,
    schema=TuneRecipe,
    run=_run,
    add_options=_add_options,
)
