"""The command line of launch/retrieve.py."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from pretrain.commands.exit_codes import run_command
from pretrain.commands.option_types import positive

DESCRIPTION = """\
Measure what a run's encoders of video and sound find: a video's sound by the video and the other way round, and videos
of a query's class by the video encoder alone.
"""
EPILOG = """\
examples:
  python launch/retrieve.py runs/r2plus1d18_speed_coaug_ks --pairs shards/ks_sound_test
  python launch/retrieve.py runs/r2plus1d18_speed_coaug_k400 --queries shards/ucf101_val --gallery shards/ucf101

exit codes: 0 done, 1 failed, 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("retrieve", make_parser(), argv, _retrieve)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; every option's help states its default."""
    parser = argparse.ArgumentParser(
        "retrieve.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder or URL it was uploaded to, or a checkpoint")
    parser.add_argument("--pairs", help="folder (any fsspec URL) of packed videos with sound")
    parser.add_argument("--queries", help="folder of packed videos with labels; sound is not needed")
    parser.add_argument("--gallery", help="folder of labelled videos in which they look (default: the other queries)")
    parser.add_argument("--clips", type=positive, help="clips of a video that are averaged (default: the run's)")
    return parser


def _retrieve(arguments: argparse.Namespace) -> None:
    import torch

    from pretrain.errors import RecipeError, WeightsError
    from pretrain.objectives.speed_coaug import SpeedCoaugObjective
    from pretrain.objectives.speed_coaug_evaluation import SpeedCoaugEvaluation
    from pretrain.runtime.process_group import present_ranks
    from pretrain.trained.load_run import load_trained

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = load_trained(arguments.run)
    objective, recipe = trained.objective, trained.recipe
    if not isinstance(objective, SpeedCoaugObjective):
        name = recipe.objective.name
        raise WeightsError(f"{trained.source}: objective {name} has no encoder of sound; speed_coaug has")
    said = recipe.objective.held_out
    options = replace(
        said, pairs=arguments.pairs, queries=arguments.queries, gallery=arguments.gallery,
        clips=arguments.clips or said.clips,
    )  # fmt: skip
    problems = options.problems("held_out")
    if not options.any:
        problems.append("nothing to look for: give --pairs or --queries")
    if problems:
        raise RecipeError(problems)
    found = SpeedCoaugEvaluation(recipe, options, present_ranks(device))(objective.to(device))
    print(trained.source)
    for name, value in found.items():
        print(f"  {value:9.2f}  {name}")
