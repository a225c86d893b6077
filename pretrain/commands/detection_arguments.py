"""The arguments of `pack.py --task detection` and their help."""

import argparse
import math

from pretrain.data.boxes.box_formats import FORMATS

#: Options by name, with what they are without --task detection.
_DEFAULTS: dict[str, object] = {}


def add_detection_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options to a parser; every help states unit and default."""
    group.add_argument("--task", choices=("detection",), help="pack keyframes with boxes; DEST is the only PATH then")
    _add(group, "--annotations", type=_files, default=(), metavar="FILES", help="box annotations, by commas; a frame "
         "list of SlowFast's layout among them tells where pictures lie")  # fmt: skip
    _add(group, "--format", choices=FORMATS, default="auto", help="of the annotations (default: told by their content)")
    _add(group, "--labels", metavar="FILE", help="class list: pbtxt of either dialect, classes.json of another split, "
         "or names, one a line")  # fmt: skip
    _add(group, "--classes", type=int, metavar="N", help="outputs of a model, where the list leaves out or lacks ids "
         "that are trained")  # fmt: skip
    _add(group, "--groups", metavar="NAME:N,...", help="groups of classes by their sizes, e.g. "
         "pose:14,object:49,interaction:17 (default: AVA's, or by the list's label_type)")  # fmt: skip
    _add(group, "--exclude", type=_files, default=(), metavar="FILES", help="lists of keyframes, `video, second`, to "
         "leave out")  # fmt: skip
    _add(group, "--detections", type=_files, default=(), metavar="FILES", help="boxes of a person detector: SlowFast's "
         "csv, AlphAction's json, mmaction's pickle; keyframes that only they name are packed as well")  # fmt: skip
    _add(group, "--min-score", type=float, default=0.0, metavar="P", help="leave out boxes of lower score (default 0)")
    _add(group, "--videos", metavar="FILE", help="only these videos: names, one a line")
    _add(group, "--split", choices=("train", "test", "all"), default="all", help="of an ACT pickle (default all)")
    _add(group, "--fold", type=int, default=1, metavar="N", help="split of an ACT pickle, from 1 (default 1)")
    _add(group, "--span", type=float, metavar="SECONDS", help="of video to either side of a keyframe (default: what 16 "
         "frames, every fourth, need at the video's rate, at least 1.5)")  # fmt: skip
    _add(group, "--video-start", type=float, default=0.0, metavar="SECONDS", help="annotated time of the videos' first "
         "frame: 900 for AVA's cut at 15 minutes (default 0)")  # fmt: skip
    _add(group, "--seconds", type=_range, default=(-math.inf, math.inf), metavar="FIRST:LAST", help="keyframes to "
         "take, e.g. 902:1798 for AVA (default all)")  # fmt: skip
    _add(group, "--box-unit", choices=("auto", "share", "pixel"), default="auto", help="of a csv with a header")
    _add(group, "--first-frame", type=int, choices=(0, 1), help="number of the first frame in a csv's column `frame`")
    _add(group, "--persons", choices=("id", "box"), default="id", help="rows of a keyframe that are one person: of one "
         "person number and box (default), or of one box, as SlowFast and EVAD")  # fmt: skip
    _add(group, "--max-persons", type=int, default=100, metavar="N", help="most persons of a keyframe (default 100)")
    _add(group, "--tolerance", type=float, default=0.01, metavar="SHARE", help="boxes this far outside the frame are "
         "clipped and counted, others refused (default 0.01)")  # fmt: skip
    _add(group, "--drop-empty", action="store_true", default=False, help="leave out keyframes without a person")
    _add(group, "--faulty", choices=("refuse", "skip"), default="refuse", help="refuse all where a row is faulty "
         "(default), or leave it out and list it in DEST/refused_rows.txt")  # fmt: skip


def _add(group: "argparse._ArgumentGroup", name: str, **settings: object) -> None:
    action = group.add_argument(name, **settings)  # type: ignore[arg-type]
    _DEFAULTS[name] = action.default


def misplaced(args: argparse.Namespace) -> list[str]:
    """List the options above that were given; without --task detection they would do nothing."""
    return [name for name, default in _DEFAULTS.items() if getattr(args, name[2:].replace("-", "_")) != default]


def _files(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: paths separated by commas")
    return names


def _range(text: str) -> tuple[float, float]:
    first, colon, last = text.partition(":")
    try:
        bounds = float(first or "-inf"), float(last or "inf")
    except ValueError:
        bounds = math.inf, -math.inf
    if not colon or bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:LAST in seconds, e.g. 902:1798")
    return bounds
