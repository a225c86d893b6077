"""True tubes of UCF101-24, JHMDB and one's own videos from a file of any format, in pixels, frames and ids from 1."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pretrain.data.boxes.action_list import (
    ActionList,
    make_action_list,
    named_classes,
    number_names,
    read_action_list,
)
from pretrain.data.boxes.ava_files import of_videos, read_video_names
from pretrain.data.boxes.box_csv import read_box_csv
from pretrain.data.boxes.box_formats import format_of
from pretrain.data.boxes.foreign_pickle import read_pickle
from pretrain.data.boxes.records import NONE, BoxRecords
from pretrain.data.boxes.tube_files import ACT_FIELDS, read_act, read_pyannot
from pretrain.data.boxes.yowo_files import read_yowo
from pretrain.errors import RecipeError
from pretrain.metrics.tubes import Tube


@dataclass(frozen=True)
class TruthOptions:
    """What files of truth leave open.

    Attributes:
        labels: path of the list of classes; ACT's pickle has its own.
        videos: path of a list of the videos that are judged; ACT's pickle has its own.
        first_frame: number of the first frame in a csv; None: a frame 0 tells.
    """

    labels: str | None = None
    videos: str | None = None
    first_frame: int | None = None


def read_tube_truth(source: str, fold: int, how: TruthOptions) -> tuple[BoxRecords, ActionList]:
    """Read ACT's pickle, pyannot.pkl, a csv with a header, or YOWO's folder of texts.

    Args:
        source: path or URL.
        fold: of ACT's test splits, from 1.
        how: what other formats leave open.

    Returns:
        Rows with boxes in pixels, and the classes, whose ids are those of the rows.

    Raises:
        RecipeError: another format, no list of videos for one that has none of a test, boxes that are no pixels, frames
            that are seconds, or labels that the list of classes lacks.
    """
    kind = format_of(source)
    if kind == "act":
        if how.labels or how.videos or how.first_frame is not None:
            raise RecipeError(f"{source}: names classes and videos itself; leave out --labels, --videos, --first-frame")
        truth, classes = read_act(source, "test", fold)
        return replace(truth, boxes=truth.boxes * _sizes(source, truth.videos)), classes
    if fold != 1:
        raise RecipeError(f"{source}: --fold is for ACT's pickle; name the videos of a split with --videos LIST")
    truth = _records(source, kind, how)
    if how.videos:
        wanted = read_video_names(how.videos)
        truth = of_videos(truth, wanted)
        if not truth.videos:
            raise RecipeError(f"{how.videos}: none of its {len(wanted)} names is a video of {source}")
    return _with_ids(truth, how.labels)


def count_folds(source: str) -> int:
    """Count the test splits of ACT's pickle.

    Raises:
        RecipeError: another file, which has none.
    """
    if format_of(source) != "act":
        raise RecipeError(f"{source}: --fold all is for ACT's pickle, which lists the videos of each fold")
    return len(read_pickle(source)["test_videos"])


def true_tubes(truth: BoxRecords) -> list[Tube] | None:
    """Join rows of one video, class and number to tubes; None where rows have no number.

    Raises:
        RecipeError: a tube with a gap, or with two boxes on a frame.
    """
    if (truth.persons == NONE).any():
        return None
    tubes = []
    for (video, label, number), rows in rows_by(truth, truth.persons).items():
        ordered = sorted(rows, key=lambda row: truth.times[row])
        frames = truth.times[ordered].astype(int)
        if (wrong := np.flatnonzero(np.diff(frames) != 1)).size:
            raise RecipeError(
                f"{truth.where(ordered[int(wrong[0]) + 1])}: tube {number} of {video}: frame {frames[wrong[0] + 1]} "
                f"follows {frames[wrong[0]]}; a tube has one box a frame: give what comes after a gap a new number"
            )
        tubes.append(Tube(video, label, int(frames[0]), truth.boxes[ordered]))
    return tubes


def rows_by(records: BoxRecords, numbers: Any) -> dict[tuple[str, int, int], list[int]]:
    """Sort rows by video, label and a number."""
    rows: dict[tuple[str, int, int], list[int]] = {}
    for row, key in enumerate(zip(records.videos, records.labels.tolist(), numbers.tolist(), strict=True)):
        rows.setdefault(key, []).append(row)
    return rows


def _records(source: str, kind: str, how: TruthOptions) -> BoxRecords:
    if kind == "pyannot":
        if how.videos is None:
            # Videos of training would count as missed.
            raise RecipeError(f"{source}: holds all videos; name those of the test with --videos testlist01.txt")
        return read_pyannot(source)
    if kind == "yowo":
        return read_yowo(source)
    if kind != "csv":
        raise RecipeError(
            f"{source}: {kind}; true tubes are ACT's pickle ({', '.join(sorted(ACT_FIELDS))}), pyannot.pkl, a csv with "
            "the header video,frame,x1,y1,x2,y2,label,person, or a folder of YOWO's texts"
        )
    truth = read_box_csv(source, first_frame=how.first_frame)
    if truth.unit != "frame":
        raise RecipeError(f"{source}:1: a column `time`; tubes are counted in frames: a column `frame` is expected")
    if not truth.pixels:
        raise RecipeError(f"{source}: boxes are shares of the frame; pixels are expected, as of the detections")
    return truth


def _with_ids(truth: BoxRecords, labels: str | None) -> tuple[BoxRecords, ActionList]:
    """Find the classes: of the list, of the names in the rows, or as many as there are ids."""
    if labels is not None:
        classes = read_action_list(labels)
    elif truth.names is not None:
        classes = named_classes(truth.source, truth.names)
    else:
        highest = int(truth.labels.max(initial=1))
        classes = make_action_list(truth.source, {one: f"class {one}" for one in range(1, highest + 1)})
    truth = number_names(truth, classes)
    if (wrong := ~np.isin(truth.labels, list(classes.names))).any():
        row = int(wrong.argmax())
        raise RecipeError(
            f"{truth.where(row)}: its label is not among the {len(classes.names)} classes of {labels or truth.source}; "
            "every box of the truth has one: give the list of this data set with --labels"
        )
    return truth, classes


def _sizes(source: str, videos: list[str]) -> Any:
    """Give width, height, width, height of each row's video [N, 4]: shares were read, inclusive sides need pixels."""
    resolution: Mapping[str, Any] = read_pickle(source)["resolution"]
    return np.array(
        [[width, height] * 2 for height, width in (resolution[video] for video in videos)], dtype=np.float64
    )
