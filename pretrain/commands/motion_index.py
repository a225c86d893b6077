"""The command line of launch/motion_index.py."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pretrain.commands.option_types import part_of, positive, whole
from pretrain.data.pack.pack_plan import WHOLE
from pretrain.errors import RecipeError, TubeletError
from pretrain.runtime.terminal import take_any_name
from pretrain.samples.motion import Kind, MotionOptions, Rule

if TYPE_CHECKING:
    from pretrain.data.index import ShardIndex
    from pretrain.data.motion_tables import Curve
    from pretrain.samples.motion_indexing import Measuring, MotionReport

DESCRIPTION = """\
Measure how much the frames of packed videos move, once, for recipes with data.sources.<name>.sampling=motion
(MGSampler): frames of a clip then carry equal shares of a video's motion, and not of its time.

FOLDER  a data set of launch/pack.py or --index-only, any fsspec URL. Shards and index.json stay as they are; beside
        them come a table of curves for each shard, and motion.json. Run the same command again after any interruption:
        shards with a finished table are skipped. What can't be measured is listed, and sampled uniformly in training.
"""
EPILOG = """\
examples:
  python launch/motion_index.py shards/train shards/val               1 - structural similarity, as released
  python launch/motion_index.py shards/train --kind abs --short-side 128
  python launch/motion_index.py shards/train --kind feature --weights pan.pth
  python launch/motion_index.py shards/train --import train.json      curves that the released scripts wrote
  python launch/motion_index.py shards/train --plot KEY --frames 8    why these frames: KEY_motion.png

exit code: 0 done (videos without a curve are reported, not an error), 1 failed, 2 wrong usage
"""
SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    take_any_name()
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        if arguments.plot is not None:
            return _plot(arguments)
        for folder in arguments.folders:
            _index(arguments, folder)
        return 0
    except RecipeError as error:
        _say(str(error))
        return 2
    except TubeletError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("interrupted; the same command continues after the last finished shard")
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; every option's help states unit and default."""
    parser = argparse.ArgumentParser(
        "motion_index.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="data set of packed shards")
    measure = parser.add_argument_group("measure")
    measure.add_argument(
        "--kind",
        choices=get_args(Kind),
        help="ssim (default): 1 - structural similarity of grey "
        "frames, as released; abs: sum of absolute differences; feature: of a convolution's output",
    )
    measure.add_argument("--weights", metavar="FILE", help="the convolution of --kind feature: a checkpoint of PAN")
    measure.add_argument(
        "--short-side",
        type=positive,
        metavar="PIXELS",
        help="shrink frames first, which changes little (default: full resolution, as released)",
    )
    measure.add_argument("--decoder", default="pyav", help="library that decodes (default: pyav)")
    measure.add_argument(
        "--import",
        dest="released",
        nargs="+",
        default=[],
        metavar="JSON",
        help="take the curves of released files; videos that they lack or don't fit are measured",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--workers", type=whole, metavar="N", help="measuring processes (default: one a core; 0: this one)"
    )
    work.add_argument(
        "--part",
        type=part_of,
        default=WHOLE,
        metavar="I/N",
        help="measure part I (from 0) of N of the shards; the last one to finish writes motion.json",
    )
    work.add_argument("--again", action="store_true", help="measure what has been measured, in this or another way")
    plot = parser.add_argument_group("plot")
    plot.add_argument("--plot", metavar="KEY", help="draw the curve of a sample and the frames that it chooses")
    plot.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: <key>_motion.png here)")
    plot.add_argument("--frames", type=positive, default=16, metavar="N", help="frames of a clip (default: 16)")
    plot.add_argument("--mu", type=float, default=MotionOptions.mu, help="exponent on the curve (default: 0.5)")
    plot.add_argument("--rule", choices=get_args(Rule), default="nearest", help="default: nearest, as released")
    return parser


def _index(arguments: argparse.Namespace, folder: str) -> None:
    # Here: --help starts without the seconds that torch takes.
    from pretrain.data.index import load_index
    from pretrain.data.motion_tables import describe_motion
    from pretrain.data.pack.progress_report import progress_bar
    from pretrain.runtime.cores import usable_cores
    from pretrain.samples.motion_indexing import holds_pictures, index_motion

    index = load_index(folder)
    if holds_pictures(index):
        raise RecipeError(
            f"{folder}: a data set of pictures, in which nothing moves; allowed: one of videos. Recipes for pictures "
            "take another data.sources.<name>.sampling than motion"
        )
    measuring, imported = _measuring(arguments, index)
    if not arguments.again:
        _refuse_mixture(index, measuring)
    workers = usable_cores() if arguments.workers is None else arguments.workers
    with progress_bar(index.samples, "videos", "motion") as progress:
        report = index_motion(folder, measuring, imported, arguments.part, workers, arguments.again, progress)
    _say(f"{folder}: {_counted(report)}")
    if report.index is None:
        _say(f"{folder}: other parts are not done yet; the last one writes motion.json")
        return
    _say(f"{folder}: {describe_motion(report.index, index.samples)}; fingerprint {report.index.fingerprint}")
    entries = report.index.entries
    missing = [f"{entry.name}/{key}: {reason}" for entry in entries for key, reason in entry.missing.items()]
    for line in missing[:SHOWN]:
        _say(f"  {line}")
    if len(missing) > SHOWN:
        _say(f"  ... and {len(missing) - SHOWN} more; motion.json lists all of them")


def _counted(report: "MotionReport") -> str:
    imported = f", {report.imported} imported" if report.imported else ""
    resumed = f"; {report.resumed} were already done" if report.resumed else ""
    return f"{report.measured} videos measured{imported}{resumed}"


def _measuring(arguments: argparse.Namespace, index: "ShardIndex") -> "tuple[Measuring, dict[str, Curve]]":
    """Make the measure, and find the curves that are imported by key."""
    from pretrain.data.decoders import DECODERS
    from pretrain.data.index import load_members
    from pretrain.data.motion_tables import MotionFacts
    from pretrain.models.weight_files import read_raw
    from pretrain.samples.motion_curves import convolution_of, measure_of
    from pretrain.samples.motion_indexing import Measuring
    from pretrain.samples.motion_released import by_key, read_released

    if arguments.decoder not in DECODERS:
        raise RecipeError(f"--decoder {arguments.decoder}: allowed are {', '.join(DECODERS)}")
    imported: dict[str, Curve] = {}
    kind: Kind = arguments.kind or "ssim"
    if arguments.released:
        released = read_released(arguments.released)
        if arguments.kind not in (None, released.kind):
            raise RecipeError(f"--kind {arguments.kind}: the files of --import hold curves of kind {released.kind}")
        kind = released.kind
        keys = [key for shard in index.shards for key in load_members(index.url, shard).keys]
        imported = by_key(released, keys)
    if kind != "feature" and arguments.weights:
        raise RecipeError(f"--weights: only --kind feature has weights, and this is {kind}")
    if arguments.weights:
        measure = convolution_of(read_raw(arguments.weights), arguments.weights)
        return Measuring(MotionFacts(kind, arguments.short_side, measure.hash), measure, arguments.decoder), imported
    if kind == "feature" and imported:
        return Measuring(MotionFacts(kind, arguments.short_side, "imported"), None, arguments.decoder), imported
    return Measuring(MotionFacts(kind, arguments.short_side), measure_of(kind), arguments.decoder), imported


def _refuse_mixture(index: "ShardIndex", measuring: "Measuring") -> None:
    from pretrain.data.motion_tables import load_motion_index
    from pretrain.errors import DataError

    try:
        found = load_motion_index(index)
    except DataError:  # of shards that have changed since, or damaged: it is written again
        return
    if found is not None and found.facts != measuring.facts:
        raise RecipeError(
            f"{index.url}: has curves of {found.facts}, and {measuring.facts} is asked for; --again replaces them, and "
            "runs that choose frames by them change"
        )


def _plot(arguments: argparse.Namespace) -> int:
    from pretrain.commands.motion_plot import plot_motion

    if len(arguments.folders) != 1:
        raise RecipeError("--plot takes one FOLDER")
    options = MotionOptions(mu=arguments.mu, rule=arguments.rule)
    if problems := options.problems("-"):
        raise RecipeError([problem.replace("-.mu", "--mu") for problem in problems])
    out = arguments.out or Path(f"{Path(arguments.plot).stem}_motion.png")
    for line in plot_motion(arguments.folders[0], arguments.plot, arguments.frames, options, arguments.kind, out):
        print(line)
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"motion_index: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
