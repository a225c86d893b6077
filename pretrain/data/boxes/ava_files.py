"""AVA's csv files, without a header: annotations, boxes with scores, lists of keyframes.

| file | columns |
|---|---|
| annotations (`ava_train_v2.2.csv`) | `video, second, x1, y1, x2, y2, action_id, person_id` |
| boxes and detections (SlowFast's `*_include_negative.csv`, results of evaluators) | `…, action_id, score` |
| keyframes without an action, in annotations; excluded keyframes | `video, second` |

One row a label: a person with three actions has three. An empty action id, and -1, is a box without a label. Seconds
are numbers: `0902` is 902. Sources: specification of action detection, 2.1, 2.2 and 2.5.
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from pretrain.data.boxes.records import NONE, BoxRecords, numbers, read_text, rows_of
from pretrain.errors import RecipeError

#: What the eighth column is.
Last = Literal["person", "score", "auto"]
WIDTHS = (2, 7, 8)


def read_ava(source: str, last: Last = "person", min_score: float = 0.0) -> BoxRecords:
    """Read a csv in AVA's columns; 1.5 million rows take some seconds.

    Args:
        source: path or URL.
        last: what the eighth column is. auto: a person's number where all of them are whole numbers without a point,
            else a score.
        min_score: rows with a lower score are left out.

    Raises:
        RecipeError: rows of another width, or with something else than numbers: all of them, with their lines.
    """
    text = read_text(source)
    parts = _Columns(source)
    problems: list[str] = []
    # The quick way takes 3 s for 1.5 million rows, the other 14; only the other tells which line is wrong.
    for lines, rows in () if parts.add_plain(text) else rows_of(text):
        try:
            parts.add(lines, rows)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return parts.records(last, min_score)


class _Columns:
    """Columns of a file, joined from chunks of rows."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.videos: list[str] = []
        self.lines: list[int] = []
        self.empty: list[tuple[str, float, int | str]] = []
        self.digits = True
        self.numbers: list[np.ndarray] = []

    def add_plain(self, text: str) -> bool:
        """Add all of a file of eight plain columns, one row a line; False where it is another, and nothing is added."""
        lines = text.splitlines()
        if '"' in text or text.count(",") != 7 * len(lines) or not lines:
            return False
        try:
            table = np.loadtxt(io.StringIO(text), delimiter=",", usecols=range(1, 8), ndmin=2, comments=None)
        except ValueError:
            return False
        if len(table) != len(lines) or not np.isfinite(table).all() or (table[:, 5] != np.floor(table[:, 5])).any():
            return False
        self.digits = not any("." in line.rpartition(",")[2] for line in lines)
        self.videos = [sys.intern(line.partition(",")[0].strip()) for line in lines]
        self.lines = list(range(1, len(lines) + 1))
        self.numbers = [table]
        return True

    def add(self, lines: list[int], rows: list[list[str]]) -> None:
        """Add some rows."""
        pairs = list(zip(lines, rows, strict=True))
        wrong = [(line, row) for line, row in pairs if len(row) not in WIDTHS or _is_header(row)]
        if wrong:
            raise RecipeError([_wrong_width(self.source, line, row) for line, row in wrong])
        kept = [number for number, row in enumerate(rows) if len(row) > 2]
        if len(kept) < len(rows):
            self._add_empty([(line, row) for line, row in pairs if len(row) == 2])
            lines, rows = [lines[number] for number in kept], [rows[number] for number in kept]
        if not rows:
            return
        lasts = [row[7] if len(row) > 7 else "" for row in rows]
        self.digits &= not any("." in one for one in lasts)
        columns = list(zip(*(row[:7] for row in rows), strict=True))
        found = [numbers(self.source, columns[place], lines, what) for place, what in enumerate(BOX_COLUMNS, 1)]
        found.append(numbers(self.source, columns[6], lines, "action id", whole=True, empty=NONE))
        # Not NaN, which stands for a text that is no number.
        found.append(numbers(self.source, lasts, lines, "last column", empty=np.finfo(np.float64).min))
        self.videos += [sys.intern(name.strip()) for name in columns[0]]
        self.lines.extend(lines)
        self.numbers.append(np.stack(found, 1))

    def _add_empty(self, pairs: Sequence[tuple[int, list[str]]]) -> None:
        lines = [line for line, _ in pairs]
        times = numbers(self.source, [row[1] for _, row in pairs], lines, "second")
        self.empty += [(row[0].strip(), float(time), line) for (line, row), time in zip(pairs, times, strict=True)]

    def records(self, last: Last, min_score: float) -> BoxRecords:
        """Build what was read."""
        table = np.concatenate(self.numbers) if self.numbers else np.zeros((0, 7))
        missing = table[:, 6] == np.finfo(np.float64).min
        persons = last == "person" or (last == "auto" and self.digits)
        values = np.where(missing, NONE if persons else np.nan, table[:, 6])
        if persons and (odd := np.flatnonzero(values != np.floor(values))).size:
            raise RecipeError(
                f"{self.source}:{self.lines[odd[0]]}: person {values[odd[0]]:g}: a whole number is expected in the "
                "last column of annotations; where it is a score, say so with --format slowfast"
            )
        nothing = np.full(len(table), np.nan)
        records = BoxRecords(
            self.source, self.videos, table[:, 0], table[:, 1:5], table[:, 5].astype(np.int64),
            nothing if persons else values,
            values.astype(np.int64) if persons else np.full(len(table), NONE), self.lines, self.empty,
        )  # fmt: skip
        return records if persons or min_score <= 0 else above(records, min_score)


#: Names of the number columns, for messages.
BOX_COLUMNS = ("second", "x1", "y1", "x2", "y2")


def _wrong_width(source: str, line: int, row: Sequence[str]) -> str:
    if len(row) == 1:
        advice = "; its columns are not separated by commas"
    elif _is_header(row):
        advice = "; a csv with a header is read with --format csv"
    else:
        advice = ""
    return (
        f"{source}:{line}: {len(row)} columns; expected are video, second, x1, y1, x2, y2, action id and a person's "
        f"number or a score, or video and second alone{advice}"
    )


def _is_header(row: Sequence[str]) -> bool:
    return len(row) > 5 and not any(_is_number(one) for one in row[1:6])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def above(records: BoxRecords, min_score: float) -> BoxRecords:
    """Leave out rows of a lower score; rows without one stay."""
    return selected(records, ~(records.scores < min_score))


def selected(records: BoxRecords, rows: Any) -> BoxRecords:
    """Take the rows of a mask [N]."""
    places: list[int] = np.flatnonzero(rows).tolist()
    return replace(
        records,
        videos=[records.videos[place] for place in places], times=records.times[places], boxes=records.boxes[places],
        labels=records.labels[places], scores=records.scores[places], persons=records.persons[places],
        places=[records.places[place] for place in places],
    )  # fmt: skip


def of_videos(records: BoxRecords, wanted: frozenset[str]) -> BoxRecords:
    """Take the rows, and the keyframes without one, of some videos."""
    kept = selected(records, [video in wanted for video in records.videos])
    return replace(kept, empty=[one for one in records.empty if one[0] in wanted])


def read_video_names(source: str) -> frozenset[str]:
    """Read a list of videos: the first word of each line, as it stands and without its ending."""
    names = [line.split()[0] for line in read_text(source).splitlines() if line.strip()]
    return frozenset(names) | {name.rpartition(".")[0] for name in names if "." in name}


def read_keyframes(source: str) -> list[tuple[str, float]]:
    """Read a list of keyframes, `video, second`, such as AVA's excluded time stamps.

    Raises:
        RecipeError: rows of another width, or seconds that are no numbers: all of them, with their lines.
    """
    found: list[tuple[str, float]] = []
    problems: list[str] = []
    for lines, rows in rows_of(read_text(source)):
        try:
            wrong = [(line, row) for line, row in zip(lines, rows, strict=True) if len(row) != 2]
            if wrong:
                raise RecipeError([
                    f"{source}:{line}: {len(row)} columns; a list of keyframes has two, video and second"
                    for line, row in wrong
                ])  # fmt: skip
            times = numbers(source, [row[1] for row in rows], lines, "second")
            found += [(sys.intern(row[0].strip()), float(time)) for row, time in zip(rows, times, strict=True)]
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return found
