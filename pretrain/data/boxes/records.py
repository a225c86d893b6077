"""Rows of box files as they are written, whatever the format: one a box and label, in columns."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.errors import RecipeError, StorageError
from pretrain.runtime import storage

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: A box without a label, and one without a person's number.
NONE = -1
#: Rows that are turned into numbers at once: of more lists alive the garbage collector makes its rounds (3x the time).
CHUNK = 2_000
SHOWN = 80


@dataclass(frozen=True)
class BoxRecords:
    """Rows of one file.

    Attributes:
        source: the file, for messages.
        videos: name of each row's video [N].
        times: keyframe of each row [N]: seconds, or numbers of frames from 1.
        boxes: x1, y1, x2, y2 [N, 4]: shares of width and height, or pixels.
        labels: class id as the file counts, `NONE` for a box without a label [N].
        scores: detector's [N]; NaN without.
        persons: number of the person or tube, `NONE` without [N].
        places: where each row stands: its line, or the name of its record [N].
        empty: (video, time, place) of keyframes that are listed without a box.
        pixels: boxes are in pixels of the video.
        unit: what `times` counts.
        names: class names where the file writes names; `labels` are then places in it, from 0.
    """

    source: str
    videos: list[str]
    times: Floats
    boxes: Floats
    labels: Integers
    scores: Floats
    persons: Integers
    places: Sequence[int | str]
    empty: list[tuple[str, float, int | str]] = field(default_factory=list)
    pixels: bool = False
    unit: Literal["second", "frame"] = "second"
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.videos)

    def where(self, row: int) -> str:
        """Say where a row stands, as messages begin."""
        return place_of(self.source, self.places[row])


def place_of(source: str, place: int | str) -> str:
    """Name a place in a file: `file:line`, or `file: record`."""
    return f"{source}:{place}" if isinstance(place, int | np.integer) else f"{source}: {place}"


def read_text(source: str) -> str:
    """Read a text file; a byte order mark is left out.

    Raises:
        RecipeError: not there, or not in UTF-8 (with the line).
    """
    data = read_file(source)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{source}:{line}: not text in UTF-8 ({error.reason} {data[error.start]:#04x}); convert it, with "
            "iconv -f latin1 -t utf-8 for example"
        ) from error


def read_file(source: str) -> bytes:
    """Read a file, local or of a store.

    Raises:
        RecipeError: it is not there.
    """
    try:
        return storage.read_bytes(source)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | IsADirectoryError):
            raise RecipeError(f"{source}: no such file; give the path of an annotation file") from error
        raise


def rows_of(text: str, delimiter: str = ",") -> Iterator[tuple[list[int], list[list[str]]]]:
    """Split a csv into rows, `CHUNK` at a time; empty lines are left out.

    Yields:
        Lines and fields of some rows.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    numbered = ((reader.line_num, row) for row in reader if row and any(row))
    while chunk := list(islice(numbered, CHUNK)):
        lines, rows = zip(*chunk, strict=True)
        yield list(lines), list(rows)


def numbers(
    source: str, column: Sequence[str], lines: Sequence[int], what: str, whole: bool = False, empty: float | None = None
) -> Floats:
    """Turn a column of texts into finite numbers.

    Args:
        source, lines, what: file, its lines and the column's name, for messages.
        column: texts.
        whole: whole numbers only.
        empty: what an empty text means; None: it is a fault.

    Raises:
        RecipeError: a text that is no number, with its line; all of them.
    """
    texts = [text.strip() or str(empty) for text in column] if empty is not None else column
    try:
        values = np.fromiter(map(float, texts), np.float64, len(texts))
    except ValueError:
        values = np.array([_number(text) for text in texts])
    wrong = ~np.isfinite(values) | (whole & (values != np.floor(values)))
    if wrong.any():
        expected = "a whole number" if whole else "a number"
        raise RecipeError([
            f"{source}:{lines[row]}: {what} {column[row][:SHOWN]!r}: {expected} is expected"
            for row in np.flatnonzero(wrong).tolist()
        ])  # fmt: skip
    return values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
