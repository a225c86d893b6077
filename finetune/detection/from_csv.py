"""`evaluate.py --from-csv`: the numbers of detections that somebody has written to a file; no recipe, model or torch.

What can't match is refused before a number is printed, because a wrong label map, pixels in the place of shares or
other seconds give a number as well: a low one. Source: systems/action_detection.md sections 4 and 7.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.detection.tubes_from_csv import score_tubes
from pretrain.data.boxes.action_list import ActionList, read_action_list
from pretrain.data.boxes.ava_files import read_ava, read_keyframes
from pretrain.data.boxes.box_csv import is_box_csv, read_box_csv
from pretrain.data.boxes.records import BoxRecords, read_text
from pretrain.errors import RecipeError, TubeletError
from pretrain.metrics.box_table import BoxTable
from pretrain.metrics.detection import PROTOCOLS, FrameMap, frame_map, strict_precision

AVA_VARIANTS = ("activitynet", "slowfast", "alphaction")
#: Share of the detections' keyframes that the truth must list. Detectors find persons where nobody was annotated, but
#: not on most keyframes.
KNOWN_SHARE = 0.2
#: A share of width or height this far outside [0, 1] is none.
SLACK = 1.0
SHOWN = 5

EXAMPLES = """\
examples:
  python launch/evaluate.py --from-csv detections.csv --truth ava_val_v2.2.csv --labels action_list_2019.pbtxt
      frame-mAP as ActivityNet's evaluator computes it, the official number of AVA
  python launch/evaluate.py --from-csv detections.csv --truth ava_val_v2.2.csv --labels action_list_2019.pbtxt
      --exclude ava_val_excluded_timestamps_v2.2.csv --variant slowfast
      as SlowFast and EVAD do, with EVAD's strict AP
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
        result = score_tubes(arguments) if arguments.tubes else _score_frames(arguments)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(arguments.out)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py --from-csv", description="Score detections that were written to a file.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--from-csv", required=True, metavar="CSV", help="video, second, x1, y1, x2, y2, class id, score"
    )
    parser.add_argument("--truth", required=True, metavar="FILE", help="annotations: AVA's csv; with --tubes see below")
    parser.add_argument("--labels", metavar="PBTXT", help="label map; its classes are those that are evaluated")
    parser.add_argument("--exclude", metavar="CSV", help="keyframes to leave out: video, second")
    parser.add_argument(
        "--variant", choices=AVA_VARIANTS, default="activitynet", help="evaluator (default activitynet)"
    )
    parser.add_argument("--tubes", action="store_true", help="UCF101-24, JHMDB: frames, pixels, tubes")
    parser.add_argument(
        "--fold", type=_fold, default=1, help="with --tubes: split of ACT's pickle, from 1 (default 1), or all"
    )
    parser.add_argument("--videos", metavar="LIST", help="with --tubes: judge the videos of this list (testlist01.txt)")
    parser.add_argument("--first-frame", type=int, choices=(0, 1), help="with --tubes: number of a csv's first frame")
    parser.add_argument(
        "--linking", default="act", help="with --tubes: parameters of linking, act or moc (default act)"
    )
    parser.add_argument("--out", metavar="JSON", help="write all numbers to this file as well")
    return parser


def _refuse_unread(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options that would be passed over: a number would be taken for what was asked.

    Raises:
        RecipeError: an option of frames with --tubes, or one of tubes without.
    """
    of_frames, of_tubes = ("exclude", "variant"), ("fold", "videos", "first_frame", "linking")
    unread = of_frames if arguments.tubes else of_tubes
    given = [name for name in unread if getattr(arguments, name) != parser.get_default(name)]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        where = "not read with" if arguments.tubes else "read only with"
        raise RecipeError(f"{options}: {where} --tubes; leave it out")


def _fold(text: str) -> int | str:
    return text if text == "all" else int(text)


@dataclass(frozen=True)
class Tables:
    """What is compared: both tables, keyframes without a box, keyframes to leave out."""

    truth: BoxTable
    detections: BoxTable
    listed: list[tuple[str, float]]
    excluded: list[tuple[str, float]]


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
    truth, detections = _read(arguments.truth, "person"), _read(arguments.from_csv, "score")
    excluded = read_keyframes(arguments.exclude) if arguments.exclude else []
    _check(truth, detections, labels)
    tables = _tables(truth, detections, excluded, arguments.variant)
    _check_keyframes(tables, truth, detections)
    found = frame_map(tables.truth, tables.detections, labels.evaluated, arguments.variant,
                      listed=tables.listed, excluded=tables.excluded)  # fmt: skip
    result = _result(found, tables, labels)
    if arguments.variant == "slowfast":
        result["strict_percent"] = strict_precision(
            tables.truth, tables.detections, labels.evaluated, excluded=tables.excluded
        )
    _show(result)
    return result


def _read(source: str, last: Any) -> BoxRecords:
    records = read_box_csv(source) if is_box_csv(read_text(source)) else read_ava(source, last)
    if records.names is not None:
        raise RecipeError(f"{source}: writes names of classes; the label map's ids are expected")
    return records


def _check(truth: BoxRecords, detections: BoxRecords, labels: ActionList) -> None:
    """Refuse what can't be compared.

    Raises:
        RecipeError: all of it, each with its first line.
    """
    problems = []
    for records in (truth, detections):
        outside = ((records.boxes < -SLACK) | (records.boxes > 1 + SLACK)).any(axis=1) | records.pixels
        if outside.any():
            row = int(outside.argmax())
            problems.append(
                f"{records.where(row)}: box {records.boxes[row].tolist()}, and {int(outside.sum())} of {len(records)} "
                "like it: shares of width and height are expected, from 0 to 1; divide pixels by the video's size"
            )
        wrong = (records.labels >= 0) & (records.labels < labels.first)
        if wrong.any():
            problems.append(
                f"{records.where(int(wrong.argmax()))}: class id 0, and the label map counts from {labels.first}: "
                f"write ids, which are a model's output + {labels.first}, not outputs"
            )
        if len(records) and not np.isin(records.labels, sorted(labels.evaluated)).any():
            problems.append(
                f"{records.source}: none of its class ids {np.unique(records.labels)[:SHOWN].tolist()} ... is in "
                f"the label map, whose are {sorted(labels.evaluated)[:SHOWN]} ...; take the label map of these ids"
            )
    if (missing := np.isnan(detections.scores)).any():
        problems.append(f"{detections.where(int(missing.argmax()))}: no score; detections need one in the last column")
    if not len(truth) or not len(detections):
        problems.append(f"{(truth if not len(truth) else detections).source}: holds no box")
    if problems:
        raise RecipeError(problems)


def _tables(truth: BoxRecords, detections: BoxRecords, excluded: list[tuple[str, float]], variant: str) -> Tables:
    """Give keyframes their keys: ActivityNet tells seconds apart to a millionth, the others cut them to whole ones."""

    def key(video: str, second: float) -> tuple[str, float]:
        return video, round(second, 6) if variant == "activitynet" else float(int(second))

    def keys(records: BoxRecords) -> list[tuple[str, float]]:
        return [key(video, time) for video, time in zip(records.videos, records.times.tolist(), strict=True)]

    labelled = truth.labels >= 0
    listed = [key(video, time) for video, time, _ in truth.empty]
    # A box without a label lists its keyframe all the same.
    names = keys(truth)
    listed += [one for one, has in zip(names, labelled.tolist(), strict=True) if not has]
    return Tables(
        BoxTable([one for one, has in zip(names, labelled.tolist(), strict=True) if has], truth.boxes[labelled],
                 truth.labels[labelled]),
        BoxTable(keys(detections), detections.boxes, detections.labels, detections.scores),
        listed, [key(*one) for one in excluded],
    )  # fmt: skip


def _check_keyframes(tables: Tables, truth: BoxRecords, detections: BoxRecords) -> None:
    """Refuse detections most of whose keyframes the truth does not know.

    Raises:
        RecipeError: with examples, and what videos and seconds there are.
    """
    known = {*tables.truth.keyframes, *tables.listed, *tables.excluded}
    found = dict.fromkeys(tables.detections.keyframes)
    unknown = [one for one in found if one not in known]
    if len(unknown) <= (1 - KNOWN_SHARE) * len(found):
        return
    videos = {*truth.videos, *(video for video, _, _ in truth.empty)}
    strange = sorted(set(detections.videos) - videos)
    hint = (
        f"{len(strange)} of its videos are not in the truth, {strange[:SHOWN]}; there they are called like "
        f"{sorted(videos)[:SHOWN]}" if strange else
        f"its seconds are {detections.times.min():g} to {detections.times.max():g}, the truth's "
        f"{truth.times.min():g} to {truth.times.max():g}"
    )  # fmt: skip
    raise RecipeError(
        f"{detections.source}: {len(unknown)} of {len(found)} keyframes are not among the {len(known)} of "
        f"{truth.source}, such as {unknown[:SHOWN]}; {hint}. Take detections and truth of the same keyframes"
    )


def _result(found: FrameMap, tables: Tables, labels: ActionList) -> dict[str, Any]:
    known = {*tables.truth.keyframes, *tables.listed}
    unmatched = [one for one in dict.fromkeys(tables.detections.keyframes) if one not in known]
    missed = known - set(tables.detections.keyframes)
    return {
        "variant": found.variant,
        "mAP": found.mean,
        "classes": [
            {"id": one, "name": labels.name(one - labels.first), "truth": found.truths[one],
             "detections": found.detections[one], "AP": precision}
            for one, precision in found.by_class.items()
        ],
        "counts": {**found.counts, "excluded_keyframes": len(set(tables.excluded)),
                   "excluded_keyframes_unmatched": len(set(tables.excluded) - known - set(tables.detections.keyframes)),
                   "truth_keyframes_without_detection": len(missed)},
        "unmatched_keyframes": [list(one) for one in unmatched],
    }  # fmt: skip


def _show(result: dict[str, Any]) -> None:
    print(f"variant {result['variant']} (numbers of other variants are not comparable)")
    for name, count in result["counts"].items():
        print(f"  {name.replace('_', ' '):<40} {count}")
    if result["unmatched_keyframes"]:
        shown = ", ".join(f"{video} {second:g}" for video, second in result["unmatched_keyframes"][:SHOWN])
        print(f"  detections on keyframes that the truth does not list, such as {shown}")
    print(f"{'id':>4} {'class':<40} {'truth':>8} {'detections':>10} {'AP %':>7}")
    for one in result["classes"]:
        precision = "-" if one["AP"] is None else f"{100 * one['AP']:.2f}"
        print(f"{one['id']:>4} {one['name'][:40]:<40} {one['truth']:>8} {one['detections']:>10} {precision:>7}")
    for name, value in result.get("strict_percent", {}).items():
        print(f"strict {name} {value:.2f} %")
    without = sum(one["AP"] is None for one in result["classes"])
    print(f"frame-mAP@0.5 {100 * result['mAP']:.2f} % ({result['variant']}, "
          f"{len(result['classes']) - without} classes, {without} without truth left out)")  # fmt: skip
