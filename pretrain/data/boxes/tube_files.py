"""Pickles of tubes and of boxes: UCF101-24, JHMDB, MultiSports in ACT's form, pyannot.pkl, mmaction's detections.

| file | form |
|---|---|
| ACT (`UCF101v2-GT.pkl`) | `labels, train_videos, test_videos, nframes, resolution, gttubes`: [n, 5] a tube |
| corrected UCF101-24 (`pyannot.pkl`) | `{video: {label, numf, annotations: [{label, sf, ef, boxes [n, 4]}]}}` |
| mmaction | `{"video,0902": [n, 5]}`: x1, y1, x2, y2, score |

Frames count from 1. Class ids count from 1 here, in the order of the file's labels. ACT's boxes are pixels; a tube's
number in its video becomes its person. Source: specification, 2.5 and 5.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pretrain.data.boxes.action_list import ActionList, make_action_list
from pretrain.data.boxes.foreign_pickle import read_pickle
from pretrain.data.boxes.records import NONE, BoxRecords
from pretrain.errors import RecipeError

Split = Literal["train", "test", "all"]
ACT_FIELDS = frozenset(("labels", "train_videos", "test_videos", "nframes", "resolution", "gttubes"))


@dataclass
class _Parts:
    """Rows in the making."""

    source: str
    videos: list[str] = field(default_factory=list)
    times: list[Any] = field(default_factory=list)
    boxes: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)
    persons: list[Any] = field(default_factory=list)
    places: list[int | str] = field(default_factory=list)
    empty: list[tuple[str, float, int | str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(
        self, video: str, times: Any, boxes: Any, places: Sequence[str], label: int = NONE, person: int = NONE,
        scores: Any = None,
    ) -> None:  # fmt: skip
        """Add the boxes of a tube, or of a keyframe."""
        count = len(boxes)
        self.videos += [video] * count
        self.times.append(times)
        self.boxes.append(boxes)
        self.labels.append(np.full(count, label))
        self.persons.append(np.full(count, person))
        self.scores.append(np.full(count, np.nan) if scores is None else scores)
        self.places += places

    def records(self, pixels: bool, unit: Literal["second", "frame"]) -> BoxRecords:
        """Build what was added."""
        if self.problems:
            raise RecipeError(self.problems)

        def column(parts: list[Any], dtype: Any) -> Any:
            return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)

        return BoxRecords(
            self.source, self.videos, column(self.times, np.float64),
            column(self.boxes, np.float64).reshape(-1, 4), column(self.labels, np.int64),
            column(self.scores, np.float64), column(self.persons, np.int64), self.places, self.empty, pixels, unit,
        )  # fmt: skip


def is_act(content: Any) -> bool:
    """Tell whether an unpickled file has ACT's fields."""
    return isinstance(content, dict) and set(content) >= ACT_FIELDS


def is_pyannot(content: Any) -> bool:
    """Tell whether an unpickled file is one of corrected annotations."""
    first = next(iter(content.values()), None) if isinstance(content, dict) else None
    return isinstance(first, dict) and "annotations" in first


def read_act(source: str, split: Split = "all", fold: int = 1) -> tuple[BoxRecords, ActionList]:
    """Read tubes in ACT's form; frames of a video without a box are `empty`.

    Args:
        source: path or URL.
        split: which list of the file names the videos.
        fold: number of the split, from 1 (JHMDB has three).

    Returns:
        Rows with boxes in shares, as the file states each video's resolution; and its classes.

    Raises:
        RecipeError: another pickle, a fold that it lacks, or tubes that are no arrays of five columns: by video.
    """
    content = read_pickle(source)
    if not is_act(content):
        raise RecipeError(f"{source}: not ACT's ground truth, which has {', '.join(sorted(ACT_FIELDS))}")
    classes = make_action_list(source, {place: str(name) for place, name in enumerate(content["labels"], 1)})
    parts = _Parts(source)
    for video in _act_videos(source, content, split, fold):
        try:
            _add_act(parts, content, video, classes)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            parts.problems.append(f"{source}: gttubes[{video!r}]: {type(error).__name__}: {error}")
    return parts.records(False, "frame"), classes


def _act_videos(source: str, content: Mapping[str, Any], split: Split, fold: int) -> list[str]:
    if split == "all":
        return sorted(content["gttubes"])
    lists = content[f"{split}_videos"]
    if not 1 <= fold <= len(lists):
        raise RecipeError(f"{source}: fold {fold}; its {split}_videos has {len(lists)}, from 1")
    return sorted(lists[fold - 1])


def _add_act(parts: _Parts, content: Mapping[str, Any], video: str, classes: ActionList) -> None:
    height, width = (int(one) for one in content["resolution"][video])
    frames = int(content["nframes"][video])
    seen: set[int] = set()
    person = 0
    for label, tubes in sorted(content["gttubes"][video].items()):
        if not 0 <= int(label) < classes.outputs:
            raise ValueError(f"label {label}; there are {classes.outputs} labels, from 0")
        for number, tube in enumerate(tubes):
            rows = _tube(tube, f"[{label}][{number}]")
            if rows[:, 0].min(initial=1) < 1 or rows[:, 0].max(initial=1) > frames:
                found = f"frames {rows[:, 0].min():g} to {rows[:, 0].max():g}"
                raise ValueError(f"[{label}][{number}]: {found}; the video has 1 to {frames}")
            shares = rows[:, 1:] / [width, height, width, height]
            places = [f"gttubes[{video!r}][{label}][{number}] frame {frame:g}" for frame in rows[:, 0]]
            parts.add(video, rows[:, 0], shares, places, int(label) + 1, person)
            seen.update(rows[:, 0].astype(int).tolist())
            person += 1
    place = f"nframes[{video!r}]"
    parts.empty += [(video, float(frame), place) for frame in range(1, frames + 1) if frame not in seen]


def _tube(tube: Any, where: str) -> np.ndarray:
    rows = np.asarray(tube, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != 5 or not np.isfinite(rows).all():
        raise ValueError(f"{where}: shape {rows.shape}; numbers in five columns are expected, frame, x1, y1, x2, y2")
    return rows


def read_pyannot(source: str, videos: Sequence[str] | None = None) -> BoxRecords:
    """Read corrected annotations of UCF101-24; frames of a video without a box are `empty`.

    Args:
        source: path or URL.
        videos: of a split list; None: all. Names that the file lacks are left to the caller.

    Returns:
        Rows with boxes in pixels, x2 = x + width, and frames from 1.

    Raises:
        RecipeError: another pickle, or annotations whose boxes don't fit their frames: by video.
    """
    content = read_pickle(source)
    if not is_pyannot(content):
        raise RecipeError(f"{source}: not pyannot.pkl, {{video: {{label, numf, annotations: [...]}}}}")
    parts = _Parts(source)
    for video in sorted(content) if videos is None else [one for one in videos if one in content]:
        try:
            _add_pyannot(parts, content[video], video)
        except (KeyError, TypeError, ValueError) as error:
            parts.problems.append(f"{source}: {video!r}: {type(error).__name__}: {error}")
    return parts.records(True, "frame")


def _add_pyannot(parts: _Parts, facts: Mapping[str, Any], video: str) -> None:
    frames = int(facts["numf"])
    seen: set[int] = set()
    for number, one in enumerate(facts["annotations"]):
        begin, end = int(one["sf"]), int(one["ef"])
        boxes = np.asarray(one["boxes"], dtype=np.float64)
        where = f"annotations[{number}]"
        if boxes.shape != (end - begin, 4) or not 0 <= begin < end <= frames:
            raise ValueError(f"{where}: frames {begin} to {end} of {frames}, boxes {boxes.shape}")
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        places = [f"{video!r} {where} frame {frame + 1}" for frame in range(begin, end)]
        parts.add(video, np.arange(begin, end) + 1, corners, places, int(one["label"]) + 1, number)
        seen.update(range(begin + 1, end + 1))
    parts.empty += [(video, float(frame), f"{video!r} numf") for frame in range(1, frames + 1) if frame not in seen]


def read_mmaction(source: str, min_score: float = 0.0) -> BoxRecords:
    """Read mmaction's pickle of detected boxes, in shares; keys without a box are `empty`.

    Args:
        source: path or URL.
        min_score: boxes with a lower score are left out.

    Raises:
        RecipeError: another pickle, or arrays of another shape: by key.
    """
    content = read_pickle(source)
    if not isinstance(content, dict):
        raise RecipeError(f'{source}: a pickled {type(content).__name__}; expected is {{"video,0902": [n, 5]}}')
    parts = _Parts(source)
    for key in sorted(content, key=str):
        try:
            video, comma, second = str(key).rpartition(",")
            rows = np.asarray(content[key], dtype=np.float64).reshape(-1, 5)
            if not comma or not np.isfinite(rows).all():
                raise ValueError("a key `video,second` and finite numbers are expected")
            time = float(second)
        except (TypeError, ValueError) as error:
            parts.problems.append(f"{source}: {key!r}: {error}; expected are x1, y1, x2, y2, score in each row")
            continue
        rows = rows[rows[:, 4] >= min_score]
        places = [f"{key!r} row {number}" for number in range(len(rows))]
        parts.add(video, np.full(len(rows), time), rows[:, :4], places, scores=rows[:, 4])
        parts.empty += [] if len(rows) else [(video, time, repr(key))]
    return parts.records(False, "second")
