"""Common part of commands with a recipe: `--recipe`, `key=value` overrides, looking at a recipe without running it."""

import argparse
import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import RecipeError, TubeletError
from pretrain.recipe.files import recipe_names
from pretrain.recipe.load import read_recipe
from pretrain.recipe.schema import Recipe
from pretrain.runtime.disk import advice, of_a_disk
from pretrain.runtime.orphans import die_with_launcher
from pretrain.runtime.terminal import guard_streams

if TYPE_CHECKING:
    from pretrain.objectives.base import Method
    from pretrain.plan.dry_run import Section


#: Variable of the job script (launch/slurm/job.sh) with the file that says wrong usage.
USAGE_NOTE = "TUBELET_USAGE_NOTE"


@dataclass(frozen=True)
class Program:
    """Traits of one command: its words, its kind of recipe, and what it does with one.

    Attributes:
        name: file in launch/.
        description: one line for --help.
        epilog: examples for --help.
        schema: kind of recipe.
        run: does the work; returns the exit code.
        add_options: puts the command's own options beside the common ones.
    """

    name: str
    description: str
    epilog: str
    schema: type[Recipe]
    run: Callable[["Method", argparse.Namespace], int]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def run_program(program: Program, argv: Sequence[str] | None = None) -> int:
    """Run a command line, sys.argv by default; returns the exit code."""
    # First of all: once the launcher is gone, it can hardly be told from init.
    die_with_launcher()
    guard_streams()
    first_rank = os.environ.get("RANK", "0") == "0"
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv, program)
        return _dispatch(arguments, program, first_rank)
    except SystemExit as leave:  # argparse: --help or wrong usage
        return _wrong_usage() if leave.code == 2 else int(leave.code or 0)
    except RecipeError as error:
        if first_rank:
            # A wrong recipe is wrong on all ranks alike, so one tells it.
            print(_problem_list(error.problems), file=sys.stderr)
        return _wrong_usage()
    except TubeletError as error:
        # Every rank may fail on its own (one lost node, one bad disk), so other ranks tell theirs in one line.
        rank = "" if first_rank else f"rank {os.environ['RANK']}: "
        print(f"{rank}{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A full or lost disk is told in one line. Any other is a fault of the program, and its traceback is wanted.
        if not of_a_disk(error):
            raise
        rank = "" if first_rank else f"rank {os.environ['RANK']}: "
        print(f"{rank}{advice(error)}; checkpoints published before are untouched", file=sys.stderr)
        return 1


def _wrong_usage() -> int:
    """Note wrong usage for the job script, which hears only what srun makes of the codes of all ranks; returns 2."""
    if note := os.environ.get(USAGE_NOTE):
        with contextlib.suppress(OSError):
            Path(note).touch()
    return 2


def _dispatch(arguments: argparse.Namespace, program: Program, first_rank: bool) -> int:
    from pretrain.objectives.base import method_of, problems_of, warnings_of

    reading = read_recipe(arguments.recipe, arguments.overrides, program.schema)
    problems = reading.problems
    # Otherwise the method's checks follow: all that is wrong is told at one go.
    if reading.recipe is None:
        raise RecipeError(problems)
    method = method_of(reading.recipe)
    # A bad value was replaced by its default, so what a check says about its key would mislead.
    problems = problems + [
        problem for problem in problems_of(method) if not any(key in problem for key in reading.bad_keys)
    ]
    if problems:
        raise RecipeError(problems)
    if first_rank:
        for warning in warnings_of(method):
            print(f"warning: {warning}", file=sys.stderr)
    if arguments.print or arguments.check or arguments.dry_run:
        return _inspect(arguments, method) if first_rank else 0
    return program.run(method, arguments)


def _inspect(arguments: argparse.Namespace, method: "Method") -> int:
    """Look at a recipe without running it; the launcher starts many ranks, one of them answers."""
    if arguments.print:
        from pretrain.recipe.show import show_recipe

        print(show_recipe(method.recipe), end="")
    elif arguments.check:
        print(f"{arguments.recipe}: no problems found")
    else:
        from pretrain.plan.dry_run import dry_run

        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        print_sections(dry_run(method))
    return 0


def print_sections(sections: "list[Section]") -> None:
    """Print tables in colour on a terminal; elsewhere one line a row, so that a log can be searched."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for section in sections:
        if not console.is_terminal:
            print(section.title)
            for name, value, remark in section.rows:
                print(f"  {name:<36} {value:<28} {remark}".rstrip())
            continue
        table = Table(title=section.title, title_justify="left", title_style="bold", box=None, show_header=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(style="dim")
        for row in section.rows:
            # Remarks hold square brackets, which rich would take for markup.
            table.add_row(*map(escape, row))
        console.print(table, "")


def _parser(program: Program) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program.name,
        usage="%(prog)s --recipe NAME|PATH [key=value ...] [--print | --check | --dry-run] [--resume auto|never|PATH]",
        description=program.description,
        epilog=program.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="NAME|PATH",
        help=f"a file of recipes/{program.schema.FOLDER} by name, or any YAML file by path; names: "
        + ", ".join(recipe_names(program.schema.FOLDER)),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a value of the recipe (YAML)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print", action="store_true", help="write the resolved recipe with its documentation")
    instead.add_argument("--check", action="store_true", help="report everything that is wrong with the recipe")
    instead.add_argument("--dry-run", action="store_true", help="everything up to the first step, without training")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): continue from the run folder's newest checkpoint that verifies, or start; "
        "never: start, and refuse a run folder that holds checkpoints; PATH: continue from this checkpoint",
    )
    # The deepspeed launcher puts it first; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    program.add_options(parser)
    return parser


def _parse(argv: Sequence[str], program: Program) -> argparse.Namespace:
    parser = _parser(program)
    # Launchers put options of theirs in front, so values and options may stand in any order.
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        options = _options(parser)
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(options)}."
        parser.error(f"unknown option {' '.join(unknown)}; {hint} Values of the recipe are set with key=value")
    return arguments


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """List the options that --help shows, the command's own among them; argparse has no public list."""
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return [word for action in shown for word in action.option_strings if word.startswith("--")]


def _problem_list(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"recipe: {problems[0]}"
    return "\n".join([f"recipe: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])
