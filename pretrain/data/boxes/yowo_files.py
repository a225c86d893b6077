"""YOWO's and HIT's texts: a file a frame, or a csv of detections; pixels, frames and class ids from 1.

| file | form |
|---|---|
| `labels/<class>/<video>/00012.txt`, or `<class>_<video>_00012.txt` | `class_id x1 y1 x2 y2`, one a box |
| detections | csv `video, frame, x1, y1, x2, y2, class_id, score` |

Source: specification, 5.1.
"""

import posixpath
import re
from dataclasses import replace

import numpy as np

from pretrain.data.boxes.ava_files import read_ava
from pretrain.data.boxes.records import NONE, BoxRecords, read_text
from pretrain.data.media import extension_of
from pretrain.errors import RecipeError
from pretrain.runtime import storage

_FLAT = re.compile(r"(?P<video>.+)_(?P<frame>\d+)")


def read_yowo(source: str, min_score: float = 0.0) -> BoxRecords:
    """Read a folder of texts, at any depth, or a csv of detections.

    Args:
        source: path or URL; a folder's videos are named by their path below it.
        min_score: detections with a lower score are left out.

    Raises:
        RecipeError: lines that are something else: all of them, with their files.
    """
    if not storage.is_folder(source):
        return replace(read_ava(source, "score", min_score), pixels=True, unit="frame")
    texts = sorted(name for name in storage.find(source) if extension_of(name) == "txt")
    videos: list[str] = []
    rows: list[tuple[float, ...]] = []
    places: list[int | str] = []
    empty: list[tuple[str, float, int | str]] = []
    problems: list[str] = []
    for name in texts:
        found = _video_and_frame(name)
        if found is None:
            continue
        before = len(rows)
        for number, line in enumerate(read_text(storage.join(source, name)).splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append((found[1], *_box(line)))
            except ValueError as error:
                problems.append(f"{storage.join(source, name)}:{number}: {error}")
                continue
            videos.append(found[0])
            places.append(f"{name} line {number}")
        if len(rows) == before:
            empty.append((found[0], float(found[1]), name))
    if problems or not (rows or empty):
        raise RecipeError(problems or f"{source}: no texts named by a frame's number, as in video/00012.txt")
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    nothing = np.full(len(table), NONE)
    return BoxRecords(
        source, videos, table[:, 0], table[:, 2:], table[:, 1].astype(np.int64), np.full(len(table), np.nan), nothing,
        places, empty, pixels=True, unit="frame",
    )  # fmt: skip


def _video_and_frame(name: str) -> tuple[str, int] | None:
    """Split the name of a text; None for one that names no frame: a list of videos, say."""
    stem = posixpath.splitext(name)[0]
    folder, last = posixpath.split(stem)
    if last.isdecimal() and folder:
        return folder, int(last)
    match = _FLAT.fullmatch(stem)
    return (match["video"], int(match["frame"])) if match else None


def _box(line: str) -> tuple[float, ...]:
    fields = line.split()
    try:
        values = [float(field) for field in fields]
    except ValueError:
        values = []
    if len(values) != 5 or not np.isfinite(values).all() or values[0] != int(values[0]):
        raise ValueError(f"{line.strip()[:80]!r}; expected is `class_id x1 y1 x2 y2`, five numbers")
    return tuple(values)
