"""A data set of one's own: a csv with a header, one row a box and label.

    video,time,x1,y1,x2,y2,label[,person][,score]

`time` is in seconds; a column `frame` in its place counts frames. Labels are names, or ids. A row without coordinates
is a keyframe without a box. Coordinates are shares of width and height, or pixels.
"""

import csv
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pretrain.data.boxes.ava_files import above
from pretrain.data.boxes.records import NONE, BoxRecords, Floats, numbers, read_text
from pretrain.errors import RecipeError

BoxUnit = Literal["auto", "share", "pixel"]
CORNERS = ("x1", "y1", "x2", "y2")
#: What other programs call the columns.
ALIASES = {
    "video_id": "video", "path": "video", "file": "video", "second": "time", "seconds": "time", "timestamp": "time",
    "frame_id": "frame", "action": "label", "class": "label", "action_id": "label", "person_id": "person",
    "track": "person", "track_id": "person", "tube": "person", "xmin": "x1", "ymin": "y1", "xmax": "x2", "ymax": "y2",
}  # fmt: skip
KNOWN = ("video", "time", "frame", *CORNERS, "label", "person", "score")
#: A share may lie this far beyond 1 by itself; larger numbers are pixels.
LARGEST_SHARE = 2.0


def is_box_csv(text: str) -> bool:
    """Tell whether a text begins with a header of boxes."""
    names = _names(text.split("\n", 1)[0])
    return "video" in names and "x1" in names


def _names(header: str) -> list[str]:
    names = [name.strip().strip('"').lower() for name in re.split(r"[,;\t]", header.lstrip("\ufeff"))]
    return [ALIASES.get(name, name) for name in names]


def read_box_csv(
    source: str, unit: BoxUnit = "auto", first_frame: int | None = None, min_score: float = 0.0
) -> BoxRecords:
    """Read a csv of boxes with a header; separated by commas, semicolons or tabs.

    Args:
        source: path or URL.
        unit: of coordinates; auto: shares where all are below 2, pixels where a corner of every box is above.
        first_frame: number of the first frame, 0 or 1, where the column is `frame`.
        min_score: rows with a lower score are left out.

    Raises:
        RecipeError: columns that are missing, rows that are something else, or what can be read in two ways: all of
            them, with their lines.
    """
    text = read_text(source)
    header = text.split("\n", 1)[0]
    columns = _Table(source, _names(header), next((one for one in "\t;" if one in header), ","))
    columns.read(text)
    pixels = columns.pixels(unit)
    times, counted = columns.times(first_frame)
    labels, names = columns.labels()
    boxed = columns.boxed
    kept = [place for place, one in enumerate(boxed) if one]
    empty: list[tuple[str, float, int | str]] = [
        (columns.videos[place], float(times[place]), columns.lines[place])
        for place, one in enumerate(boxed) if not one
    ]  # fmt: skip
    records = BoxRecords(
        source, [columns.videos[place] for place in kept], times[kept], columns.boxes(), labels[kept],
        columns.optional("score", np.nan)[kept], columns.optional("person", NONE, True)[kept].astype(np.int64),
        [columns.lines[place] for place in kept], [], pixels, counted, names,
    )  # fmt: skip
    found = above(records, min_score) if min_score > 0 else records
    return replace(found, empty=empty)


@dataclass
class _Table:
    """Columns of a file, as texts."""

    source: str
    names: list[str]
    delimiter: str

    def __post_init__(self) -> None:
        self.lines: list[int] = []
        self.columns: dict[str, list[str]] = {}
        missing = [name for name in ("video", *CORNERS) if name not in self.names]
        if not {"time", "frame"} & set(self.names):
            missing.insert(1, "time or frame")
        if missing or len(set(self.names)) < len(self.names):
            found = ", ".join(self.names)
            raise RecipeError(
                f"{self.source}:1: no column {', '.join(missing) or 'may stand twice'} in the header ({found}); "
                "expected is video,time,x1,y1,x2,y2,label and optionally person, score"
            )

    def read(self, text: str) -> None:
        """Take the rows apart."""
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter, skipinitialspace=True)
        next(reader)
        rows: list[list[str]] = []
        problems: list[str] = []
        for row in reader:
            if not any(one.strip() for one in row):
                continue
            if len(row) != len(self.names):
                expected = f"{len(self.names)} as in the header; quote values that hold {self.delimiter!r}"
                problems.append(f"{self.source}:{reader.line_num}: {len(row)} columns, expected are {expected}")
                continue
            rows.append(row)
            self.lines.append(reader.line_num)
        if problems:
            raise RecipeError(problems)
        if not rows:
            raise RecipeError(f"{self.source}: no row below the header; one a box and label is expected")
        self.columns = {
            name: [one.strip() for one in column]
            for name, column in zip(self.names, zip(*rows, strict=True), strict=True)
        }
        self.videos = [sys.intern(name) for name in self.columns["video"]]
        corners = list(zip(*(self.columns[name] for name in CORNERS), strict=True))
        self.boxed = [any(one) for one in corners]
        problems = [f"{self.source}:{line}: no video" for line, name in zip(self.lines, self.videos, strict=True)
                    if not name]  # fmt: skip
        if problems:
            raise RecipeError(problems)

    def _rows(self, name: str) -> tuple[list[str], list[int]]:
        """Give a column and its lines, of rows with a box."""
        kept = [place for place, one in enumerate(self.boxed) if one]
        return [self.columns[name][place] for place in kept], [self.lines[place] for place in kept]

    def boxes(self) -> Floats:
        """Give the corners of rows with a box [N, 4]."""
        found = [numbers(self.source, *self._rows(name), name) for name in CORNERS]
        return np.stack(found, 1)

    def times(self, first_frame: int | None) -> tuple[Floats, Literal["second", "frame"]]:
        """Give the times of all rows, and what they count; frames from 1."""
        if "time" in self.columns:
            return numbers(self.source, self.columns["time"], self.lines, "time"), "second"
        frames = numbers(self.source, self.columns["frame"], self.lines, "frame", whole=True)
        if first_frame is None:
            lowest = frames.min()
            # A frame 0 tells; without one, counting from 0 and from 1 look the same.
            if lowest != 0:
                raise RecipeError(
                    f"{self.source}: frames from {lowest:g} on: do they count from 0 or from 1? Say --first-frame"
                )
            first_frame = 0
        if (wrong := np.flatnonzero(frames < first_frame).tolist()):
            raise RecipeError(
                f"{self.source}:{self.lines[wrong[0]]}: frame {frames[wrong[0]]:g}; --first-frame is {first_frame}"
            )
        return frames + (1 - first_frame), "frame"

    def optional(self, name: str, empty: float, whole: bool = False) -> Any:
        """Give a column of numbers that may be missing, of all rows."""
        if name not in self.columns:
            return np.full(len(self.lines), empty)
        stand_in = np.finfo(np.float64).min
        found = numbers(self.source, self.columns[name], self.lines, name, whole, stand_in)
        return np.where(found == stand_in, empty, found)

    def labels(self) -> tuple[Any, tuple[str, ...] | None]:
        """Give the labels of all rows: ids, or places among the names, which are returned as well."""
        texts = self.columns.get("label", [""] * len(self.lines))
        given = [one for one in texts if one]
        if all(re.fullmatch(r"-?\d+", one) for one in given):
            return np.array([int(one) if one else NONE for one in texts]), None
        digits = [line for line, one in zip(self.lines, texts, strict=True) if re.fullmatch(r"-?\d+", one)]
        if digits:
            raise RecipeError(
                f"{self.source}:{digits[0]}: label {texts[self.lines.index(digits[0])]!r} is a number, others are "
                f"names ({next(one for one in given if not one.isdecimal())!r}); write all as names, or all as ids"
            )
        names = tuple(sorted(set(given)))
        places: Mapping[str, int] = {name: place for place, name in enumerate(names)}
        return np.array([places[one] if one else NONE for one in texts]), names

    def pixels(self, unit: BoxUnit) -> bool:
        """Tell whether coordinates are pixels."""
        if unit != "auto":
            return unit == "pixel"
        boxes = self.boxes()
        large = (np.abs(boxes) > LARGEST_SHARE).any(axis=1)
        if not large.any() or large.all():
            return bool(len(boxes)) and bool(large.all())
        lines: Sequence[int] = self._rows("x1")[1]
        one, other = int(np.argmax(large)), int(np.argmin(large))
        raise RecipeError(
            f"{self.source}:{lines[one]}: box {_shown(boxes[one])} looks like pixels, {self.source}:{lines[other]}: "
            f"{_shown(boxes[other])} like shares of the frame; say which with --box-unit pixel or share"
        )


def _shown(box: Floats) -> str:
    return ", ".join(f"{one:g}" for one in box)
