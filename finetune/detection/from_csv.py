"""`evaluate.py --from-csv`: the numbers of detections that somebody has written to a file, without recipe or torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.detection.frame_tables import SHOWN, FrameTables, read_frame_tables
from finetune.detection.tubes_from_csv import score_tubes
from pretrain.data.boxes.action_list import ActionList, read_action_list
from pretrain.errors import RecipeError, TubeletError
from pretrain.metrics.detection import PROTOCOLS, FrameMap, frame_map, person_precision, strict_precision

AVA_VARIANTS = ("activitynet", "slowfast", "alphaction")
#: Options that each way of counting reads, beyond the files.
READ = {
    "frames": {"labels", "exclude", "variant", "first_frame"},
    "persons": {"exclude", "first_frame"},
    "tubes": {"labels", "fold", "videos", "first_frame", "linking"},
}

EXAMPLES = """\
examples:
  python launch/evaluate.py --from-csv detections.csv --truth ava_val_v2.2.csv --labels action_list_2019.pbtxt
      frame-mAP as ActivityNet's evaluator computes it, the official number of AVA
  python launch/evaluate.py --from-csv detections.csv --truth ava_val_v2.2.csv --labels action_list_2019.pbtxt
      --exclude ava_val_excluded_timestamps_v2.2.csv --variant slowfast
      as SlowFast and EVAD do, with EVAD's strict AP
  python launch/evaluate.py --from-csv detections.csv --truth own.csv --labels shards/own/classes.json
      a truth with a header, as pack.py --task detection takes it: video,time,x1,y1,x2,y2,label,person, shares
  python launch/evaluate.py --from-csv persons.csv --truth ava_val_v2.2.csv --persons
      how well a person detector finds the persons, whatever they do
  python launch/evaluate.py --from-csv detections.csv --truth JHMDB-GT.pkl --tubes
      frame-mAP and video-mAP of UCF101-24 and JHMDB, boxes linked to tubes
  python launch/evaluate.py --from-csv 'found_{fold}.csv' --truth JHMDB-GT.pkl --tubes --fold all
      of each fold and their mean, as JHMDB's numbers are published
  python launch/evaluate.py --from-csv found.csv --truth pyannot.pkl --videos testlist01.txt --tubes
      other truths: also own.csv (video,frame,x1,y1,x2,y2,label,person, pixels), a folder of YOWO's texts

exit codes: 0 done, 1 failed, 2 wrong files or usage
guide: docs/detection_metrics.md
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        parser = _parser()
        arguments = parser.parse_args(argv)
        _refuse_unread(parser, arguments)
        score = score_tubes if arguments.tubes else _score_persons if arguments.persons else _score_frames
        result = score(arguments)
        if arguments.out:
            _write(result, Path(arguments.out))
        return 0
    except SystemExit as leave:  # argparse: --help or wrong usage
        return int(leave.code or 0)
    except RecipeError as error:
        print("\n".join(error.problems[:SHOWN]), file=sys.stderr)
        if len(error.problems) > SHOWN:
            print(f"... and {len(error.problems) - SHOWN} more", file=sys.stderr)
        return 2
    except TubeletError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _write(result: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--out {path}: the numbers above can't be written ({error})") from error
    print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py --from-csv", description="Score detections that were written to a file.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--from-csv", required=True, metavar="CSV", help="video, second, x1, y1, x2, y2, class id, score"
    )
    parser.add_argument("--truth", required=True, metavar="FILE", help="annotations: AVA's csv; with --tubes see below")
    parser.add_argument("--labels", metavar="FILE", help="label map: pbtxt, or classes.json beside packed shards; its "
                        "classes are those that are evaluated")  # fmt: skip
    parser.add_argument("--exclude", metavar="CSV", help="keyframes to leave out: video, second")
    parser.add_argument(
        "--variant", choices=AVA_VARIANTS, default="activitynet", help="evaluator (default activitynet)"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--persons", action="store_true", help="AP of boxes as persons, as COCO counts, no label map")
    way.add_argument("--tubes", action="store_true", help="UCF101-24, JHMDB: frames, pixels, tubes")
    parser.add_argument(
        "--fold", type=_fold, default=1, help="with --tubes: split of ACT's pickle, from 1 (default 1), or all"
    )
    parser.add_argument("--videos", metavar="LIST", help="with --tubes: judge the videos of this list (testlist01.txt)")
    parser.add_argument("--first-frame", type=int, choices=(0, 1), help="number of the first frame in a csv's column "
                        "`frame` (default: a frame 0 tells)")  # fmt: skip
    parser.add_argument(
        "--linking", default="act", help="with --tubes: parameters of linking, act or moc (default act)"
    )
    parser.add_argument("--out", metavar="JSON", help="write all numbers to this file as well")
    return parser


def _refuse_unread(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options that would be passed over: a number would be taken for what was asked.

    Raises:
        RecipeError: an option of another way of counting.
    """
    way = "tubes" if arguments.tubes else "persons" if arguments.persons else "frames"
    others = set().union(*READ.values()) - READ[way]
    set_by_user = (name for name, value in vars(arguments).items() if value != parser.get_default(name))
    given = [name for name in set_by_user if name in others]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        where = "not read without --tubes" if way == "frames" else f"not read with --{way}"
        raise RecipeError(f"{options}: {where}; leave it out")


def _fold(text: str) -> int | str:
    return text if text == "all" else int(text)


def _score_frames(arguments: argparse.Namespace) -> dict[str, Any]:
    if not arguments.labels:
        raise RecipeError("--labels is missing: the label map says which classes are evaluated, 60 of AVA's 80")
    if arguments.exclude and not PROTOCOLS[arguments.variant].exclusions:
        raise RecipeError(
            f"--exclude {arguments.exclude}: the evaluator {arguments.variant} knows no excluded keyframes, it ignores "
            "detections on keyframes that the truth does not list; leave it out, or take --variant slowfast or "
            "alphaction"
        )
    labels = read_action_list(arguments.labels)
    tables = _read_tables(arguments, labels)
    found = frame_map(tables.truth, tables.detections, labels.evaluated, arguments.variant,
                      listed=tables.listed, excluded=tables.excluded)  # fmt: skip
    result = _result(found, tables, labels)
    if arguments.variant == "slowfast":
        result["strict_percent"] = strict_precision(
            tables.truth, tables.detections, labels.evaluated, excluded=tables.excluded
        )
    _show(result)
    return result


def _score_persons(arguments: argparse.Namespace) -> dict[str, Any]:
    tables = _read_tables(arguments, None)
    found = person_precision(tables.truth, tables.detections, listed=tables.listed, excluded=tables.excluded)
    strict = list(found.by_threshold.values())
    result = {"AP": found.mean, "AP50": strict[0], "AP75": strict[5], "persons": found.truths[0], "boxes":
              found.detections[0]} | _counts(found, tables)  # fmt: skip
    _show_counts(result)
    print(f"{result['persons']} persons, {result['boxes']} boxes, as COCO counts, whatever they do")
    print(f"person AP@0.5 {100 * strict[0]:.2f} %, @0.75 {100 * strict[5]:.2f} %, @0.5:0.95 {100 * found.mean:.2f} %")
    return result


def _read_tables(arguments: argparse.Namespace, labels: ActionList | None) -> FrameTables:
    # ActivityNet tells seconds apart, the other evaluators cut them.
    whole_seconds = labels is not None and arguments.variant != "activitynet"
    return read_frame_tables(
        arguments.truth, arguments.from_csv, arguments.exclude, labels, arguments.first_frame, whole_seconds
    )


def _result(found: FrameMap, tables: FrameTables, labels: ActionList) -> dict[str, Any]:
    return {
        "variant": found.variant,
        "mAP": found.mean,
        "classes": [
            {"id": one, "name": labels.name(one - labels.first), "truth": found.truths[one],
             "detections": found.detections[one], "AP": precision}
            for one, precision in found.by_class.items()
        ],
        **_counts(found, tables),
    }


def _counts(found: FrameMap, tables: FrameTables) -> dict[str, Any]:
    """Count what was read, left out and not matched."""
    known, keyframes = tables.known, dict.fromkeys(tables.detections.keyframes)
    excluded = set(tables.excluded)
    counts = {
        "truth_boxes_outside_the_frame": tables.outside[0],
        "detection_boxes_outside_the_frame": tables.outside[1],
        "excluded_keyframes": len(excluded),
        "excluded_keyframes_unmatched": len(excluded - known - set(keyframes)),
        "truth_keyframes_without_detection": len(known - set(keyframes)),
    }
    unmatched = [list(one) for one in keyframes if one not in known]  # type: ignore[call-overload]
    return {"counts": found.counts | counts, "unmatched_keyframes": unmatched}


def _show(result: dict[str, Any]) -> None:
    print(f"variant {result['variant']} (numbers of other variants are not comparable)")
    _show_counts(result)
    print(f"{'id':>4} {'class':<40} {'truth':>8} {'detections':>10} {'AP %':>7}")
    for one in result["classes"]:
        precision = "-" if one["AP"] is None else f"{100 * one['AP']:.2f}"
        print(f"{one['id']:>4} {one['name'][:40]:<40} {one['truth']:>8} {one['detections']:>10} {precision:>7}")
    for name, value in result.get("strict_percent", {}).items():
        print(f"strict {name} {value:.2f} %")
    without = sum(one["AP"] is None for one in result["classes"])
    print(f"frame-mAP@0.5 {100 * result['mAP']:.2f} % ({result['variant']}, "
          f"{len(result['classes']) - without} classes, {without} without truth left out)")  # fmt: skip


def _show_counts(result: dict[str, Any]) -> None:
    for name, count in result["counts"].items():
        print(f"  {name.replace('_', ' '):<40} {count}")
    if result["unmatched_keyframes"]:
        shown = ", ".join(f"{video} {second:g}" for video, second in result["unmatched_keyframes"][:SHOWN])
        print(f"  detections on keyframes that the truth does not list, such as {shown}")
