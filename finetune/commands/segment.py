"""Command line of launch/segment.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.open_vocabulary.protocols import PROTOCOLS
from pretrain.errors import DataError, RecipeError, TubeletError
from pretrain.runtime.terminal import take_any_name

DESCRIPTION = """\
Segment by free text with a projector that TagAlign has trained: a picture or a video by queries, or packed pictures
with masks by the protocol of a published set, whose mIoU is told.

PICTURE  a picture or a video, any fsspec URL; with --set a folder of launch/pack.py --kind image --with mask.png=FOLDER
"""
EPILOG = """\
examples:
  python launch/segment.py cat.jpg --weights runs/clip_vit_b16_tagalign --query "a black cat" --query grass
  python launch/segment.py street.mp4 --weights runs/clip_vit_b16_tagalign --query car --query road --fps 5
  python launch/segment.py shards/voc_val --weights runs/clip_vit_b16_tagalign --set voc
  python launch/segment.py shards/own_val --weights weights/own --set own --class-names classes.txt --background 0.4

sets: %s; own: yours, with --class-names
A set's background is at the published threshold 0.4; queries have none unless --background says so.
exit codes: 0 done, 1 failed, 2 wrong usage
"""
#: Mask of the background in published results.
THRESHOLD = 0.4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    take_any_name()
    arguments = make_parser().parse_args(argv)
    try:
        _check_looks(arguments)
        _evaluate(arguments) if arguments.set else _draw(arguments)
    except RecipeError as error:
        print(f"segment: {error}", file=sys.stderr)
        return 2
    except TubeletError as error:
        print(f"segment: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; every option's help states its default."""
    parser = argparse.ArgumentParser(
        "segment.py", description=DESCRIPTION, epilog=EPILOG % ", ".join(PROTOCOLS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("picture", help="picture, video, or with --set packed pictures; any fsspec URL")
    parser.add_argument("--weights", required=True, metavar="RUN_OR_EXPORT", help="run, checkpoint, or exported folder")
    ask = parser.add_argument_group("what is asked")
    ask.add_argument("--query", action="append", default=[], metavar="TEXT", help="a class in words; more words for "
                     "the same one behind ;")  # fmt: skip
    ask.add_argument("--class-names", metavar="FILE", help="a class a line; in the place of a set's own names")
    ask.add_argument("--set", choices=(*PROTOCOLS, "own"), help="judge packed pictures as this set's results are")
    ask.add_argument("--background", type=float, metavar="M", help="pixels whose masks are all below are none")
    ask.add_argument("--template", action="append", metavar="TEXT", help="sentence about a class, {} in its place; "
                     "several: the mean (default: a photo of a {}.)")  # fmt: skip
    look = parser.add_argument_group("how")
    look.add_argument("--blend", type=float, default=0.3, metavar="W", help="share of CLIP's own masks (default 0.3; "
                      "1: CLIP surgery alone)")  # fmt: skip
    look.add_argument("--short-side", type=int, metavar="PIXELS", help="of pictures (default: twice training's)")
    look.add_argument("--window", type=int, metavar="PIXELS", help="sliding window (default: the short side)")
    look.add_argument("--stride", type=int, metavar="PIXELS", help="between windows (default: half a window)")
    look.add_argument("--fps", type=float, default=2.0, metavar="N", help="frames of a video a second (default 2)")
    own = parser.add_argument_group("an own set")
    own.add_argument("--first-class", type=int, default=0, help="value of the first class, or the background, in masks "
                     "(default 0)")  # fmt: skip
    own.add_argument("--ignored", type=int, default=255, help="value in masks that counts nowhere (default 255)")
    parser.add_argument("--out", type=Path, help="picture to write, or with --set a folder for scores.json and "
                        "per_class.csv (default: PICTURE's name with _queries.png, here; no folder)")  # fmt: skip
    return parser


def _check_looks(arguments: argparse.Namespace) -> None:
    """Refuse numbers that can't be meant, before anything is loaded; NaN is within no bounds."""
    found = []
    for name in ("blend", "background"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value <= 1:
            found.append(f"--{name} {value:g}: allowed: from 0 to 1")
    for name in ("short_side", "window", "stride"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            found.append(f"--{name.replace('_', '-')} {value}: allowed: 1 or more pixels")
    if not 0 < arguments.fps < float("inf"):
        found.append(f"--fps {arguments.fps:g}: allowed: more than 0")
    if found:
        raise RecipeError(found)


def _open(arguments: argparse.Namespace, device: Any) -> Any:
    from finetune.open_vocabulary.text_segmenter import SegmenterOptions, open_segmenter
    from pretrain.objectives.tag_texts import SIMPLE

    options = SegmenterOptions(
        arguments.blend, arguments.short_side, arguments.window, arguments.stride,
        tuple(arguments.template or (SIMPLE,)),
    )  # fmt: skip
    return open_segmenter(arguments.weights, device, options)


def _draw(arguments: argparse.Namespace) -> None:
    import torch

    from finetune.open_vocabulary.queried_pictures import draw_queries

    queries = [*arguments.query, *(_names(arguments.class_names) if arguments.class_names else [])]
    if twice := sorted({query for query in queries if queries.count(query) > 1}):
        raise RecipeError(f"--query {twice[0]!r}: asked twice; each once")
    if len(queries) == 1 and arguments.background is None:
        print("one query and no --background: every pixel is nearest to it; --background 0.4 says where it is not")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = arguments.out or Path(f"{PurePosixPath(arguments.picture).stem}_queries.png")
    segmenter = _open(arguments, device)
    lines, files = draw_queries(segmenter, arguments.picture, queries, arguments.background, arguments.fps, out)
    print("\n".join(lines))
    for path in files:
        print(f"picture: {path}" if path.suffix == ".png" else f"video: {path}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from finetune.open_vocabulary.set_evaluation import evaluate_set, own_protocol, write_scores
    from pretrain.runtime.process_group import join, leave

    if arguments.query:
        raise RecipeError("--query: of a picture; the classes of a set are its own, or --class-names FILE")
    names = _names(arguments.class_names) if arguments.class_names else None
    if arguments.set == "own":
        if names is None:
            raise RecipeError("--set own: needs --class-names FILE, a class a line in the order of the masks' values")
        protocol = own_protocol(names, arguments.background is not None, arguments.first_class, arguments.ignored)
    else:
        protocol = PROTOCOLS[arguments.set]
    if names is None and protocol.names is None:
        raise RecipeError(f"--set {arguments.set}: needs --class-names FILE with {protocol.count} names, in order")
    threshold = THRESHOLD if arguments.background is None else arguments.background
    ranks = join()
    try:
        segmenter = _open(arguments, ranks.device)
        scores, confusion, every = evaluate_set(
            segmenter, protocol, names or protocol.names or (), arguments.picture, threshold, ranks
        )
    finally:
        leave(ranks)
    if not ranks.first:
        return
    print(f"{protocol.what}: {scores['pictures']:.0f} pictures, {len(every)} classes")
    for name, text in (("mIoU", "mIoU"), ("mean_accuracy", "mean accuracy"), ("pixel_accuracy", "pixel accuracy")):
        print(f"  {scores[name]:6.2f}  {text}, %")
    if arguments.out:
        write_scores(arguments.out, scores, confusion, every)
        print(f"per class: {arguments.out / 'per_class.csv'}")


def _names(path: str) -> list[str]:
    from pretrain.errors import StorageError
    from pretrain.runtime import storage

    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except (StorageError, UnicodeDecodeError) as error:
        raise DataError(f"--class-names {path}: {error}") from error
    if not (names := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"--class-names {path}: an empty file; a class a line is needed")
    return names


if __name__ == "__main__":
    sys.exit(main())
