"""Truth and detections on keyframes, read from files and held against each other: the tables that metrics take.

What can't match is refused before a number is printed, because a wrong label map, pixels in the place of shares or
other seconds give a number as well: a low one. Source: systems/action_detection.md sections 4 and 7.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.data.boxes.action_list import ActionList, number_names
from pretrain.data.boxes.ava_files import read_ava, read_keyframes
from pretrain.data.boxes.box_csv import is_box_csv, read_box_csv
from pretrain.data.boxes.records import BoxRecords, read_text
from pretrain.errors import RecipeError
from pretrain.metrics.box_table import BoxTable

Key = tuple[str, float]

#: Share of the detections' keyframes that the truth must list. Detectors find persons where nobody was annotated, but
#: not on most keyframes.
KNOWN_SHARE = 0.2
#: A share of width or height this far outside [0, 1] is none.
SLACK = 1.0
#: Boxes further outside of the frame are counted; annotations are rounded.
TOLERANCE = 0.01
SHOWN = 5


@dataclass(frozen=True)
class FrameTables:
    """What is compared.

    Attributes:
        truth, detections: rows with a label; of persons, all.
        listed: keyframes that the truth lists without a box.
        excluded: keyframes to leave out.
        outside: boxes of truth and of detections that reach out of the frame.
    """

    truth: BoxTable
    detections: BoxTable
    listed: list[Key]
    excluded: list[Key]
    outside: tuple[int, int]

    @property
    def known(self) -> set[Key]:
        """Keyframes that the truth lists."""
        return {*self.truth.keyframes, *self.listed}  # type: ignore[arg-type]


def read_frame_tables(
    truth_file: str, detections_file: str, exclude: str | None, labels: ActionList | None, first_frame: int | None,
    whole_seconds: bool,
) -> FrameTables:  # fmt: skip
    """Read both files and hold them against each other.

    Args:
        truth_file, detections_file: AVA's columns, or a csv with a header.
        exclude: list of keyframes to leave out.
        labels: label map; None: of persons, whatever they do.
        first_frame: number of the first frame in a csv with a header; None: a frame 0 tells.
        whole_seconds: keyframes are cut to whole seconds; else they are told apart to a millionth.

    Raises:
        RecipeError: what can't be compared, all of it.
    """
    truth = _read(truth_file, "person", labels, first_frame)
    if first_frame is not None and truth.unit != "frame":
        raise RecipeError(f"--first-frame: {truth_file} has no column `frame`; leave it out")
    detections = _read(detections_file, "score", labels, first_frame)
    excluded = read_keyframes(exclude) if exclude else []
    _check(truth, detections, labels)
    tables = _tables(truth, detections, excluded, labels is None, whole_seconds)
    _check_keyframes(tables, truth, detections)
    return tables


def _read(source: str, last: Any, labels: ActionList | None, first_frame: int | None) -> BoxRecords:
    if not is_box_csv(read_text(source)):
        return read_ava(source, last)
    records = read_box_csv(source, first_frame=first_frame)
    if records.names is None or labels is None:
        return records
    numbered = number_names(records, labels)
    if (wrong := numbered.labels < -1).any():
        row = int(wrong.argmax())
        raise RecipeError(
            f"{records.where(row)}: class {records.names[records.labels[row]]!r} is not in the label map, whose are "
            f"{list(labels.names.values())[:SHOWN]} ...; give the classes.json of the shards with --labels"
        )
    return numbered


def _check(truth: BoxRecords, detections: BoxRecords, labels: ActionList | None) -> None:
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
        if labels is None:
            continue
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


def _tables(
    truth: BoxRecords, detections: BoxRecords, excluded: list[Key], persons: bool, whole_seconds: bool
) -> FrameTables:
    """Give rows the keys of their keyframes; of truth, boxes without a label are left out unless persons are meant."""

    def key(video: str, second: float) -> Key:
        return video, float(int(second)) if whole_seconds else round(second, 6)

    def keys(records: BoxRecords) -> list[Key]:
        return [key(video, time) for video, time in zip(records.videos, records.times.tolist(), strict=True)]

    counts = np.ones(len(truth), bool) if persons else truth.labels >= 0
    # A box without a label lists its keyframe all the same.
    names, listed = keys(truth), [key(video, time) for video, time, _ in truth.empty]
    listed += [one for one, has in zip(names, counts.tolist(), strict=True) if not has]
    kept = [one for one, has in zip(names, counts.tolist(), strict=True) if has]
    return FrameTables(
        BoxTable(kept, truth.boxes[counts], truth.labels[counts]),
        BoxTable(keys(detections), detections.boxes, detections.labels, detections.scores),
        listed, [key(*one) for one in excluded], (_outside(truth), _outside(detections)),
    )  # fmt: skip


def _outside(records: BoxRecords) -> int:
    """Count the boxes that reach out of the frame."""
    return int(((records.boxes < -TOLERANCE) | (records.boxes > 1 + TOLERANCE)).any(axis=1).sum())


def _check_keyframes(tables: FrameTables, truth: BoxRecords, detections: BoxRecords) -> None:
    """Refuse detections most of whose keyframes the truth does not know.

    Raises:
        RecipeError: with examples, and what videos and seconds there are.
    """
    known = tables.known | set(tables.excluded)
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
