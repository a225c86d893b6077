"""The command line of launch/sound_statistics.py."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pretrain.commands.exit_codes import run_command
from pretrain.commands.pack_arguments import positive
from pretrain.errors import RecipeError, SampleError

if TYPE_CHECKING:
    from pretrain.data.members import Members
    from pretrain.recipe.schema import Recipe

DESCRIPTION = """\
Measure mean and deviation of each bin of a recipe's spectrograms over its videos, once, for
input.spectrogram.statistics: the middle window of each, at speed 1. Videos without sound, or with too little of it, are
left out and counted.
"""
EPILOG = """\
example:
  python launch/sound_statistics.py --recipe r2plus1d18_speed_coaug_k400 k400_sound.npz
  deepspeed launch/pretrain.py --recipe r2plus1d18_speed_coaug_k400 input.spectrogram.statistics=k400_sound.npz

exit code: 0 done, 1 failed, 2 wrong usage
"""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    return run_command("sound_statistics", make_parser(), argv, _measure)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; every option's help states unit and default."""
    parser = argparse.ArgumentParser(
        "sound_statistics.py", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("out", help="file to write (.npz), any fsspec URL")
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe")
    parser.add_argument("--recipe", required=True, help="name or file of a recipe whose input is audio_video")
    parser.add_argument(
        "--videos", type=positive, default=10_000, metavar="N", help="videos, spread evenly over all (default 10000)"
    )
    return parser


def _measure(arguments: argparse.Namespace) -> None:
    from pretrain.recipe.load import load_recipe
    from pretrain.samples import audio_video
    from pretrain.samples.spectrogram import StatisticsSum

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    options = recipe.input
    if not isinstance(options, audio_video.Config):
        raise RecipeError(f"input.name: found {options.name}, allowed: audio_video, whose samples have sound")
    if problems := options.problems():
        raise RecipeError(problems)
    samples, sums, left_out = audio_video.AudioVideo(options, 0), StatisticsSum(options.spectrogram.bins), 0
    for members in _members(recipe, arguments.videos):
        try:
            sums.add(samples.window(members))
        except SampleError as error:
            left_out += 1
            logger.warning("%s of %s left out: %s", members.key, members.url, error)
    found = sums.write(arguments.out, options.sound.rate, options.spectrogram)
    mean, std = float(found.mean.mean()), float(found.std.mean())
    counted = f"{sums.windows} windows, {left_out} videos left out"
    print(f"{arguments.out}: {counted}; mean {mean:.1f} dB, deviation {std:.1f}")


def _members(recipe: "Recipe", most: int) -> "Iterator[Members]":
    """Read at most so many samples of all sources, spread evenly."""
    from pretrain.data.fetch import SampleReader
    from pretrain.data.index import load_index
    from pretrain.data.members import parse_sample

    indices = [load_index(source.shards) for source in recipe.data.sources.values()]
    reader = SampleReader(indices, None, recipe.data.deadline_s)
    places = [
        (number, shard, row)
        for number, index in enumerate(indices)
        for shard, count in enumerate(index.shards.samples.tolist())
        for row in range(count)
    ]
    step = max(len(places) / most, 1.0)
    for position in range(min(most, len(places))):
        yield parse_sample(reader.read(*places[int(position * step)]))


if __name__ == "__main__":
    sys.exit(main())
