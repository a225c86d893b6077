"""Pictures of a frame folder: which of them are the video, and in which order.

Without a template all of them must be one series: names that differ in one number, which orders them. A template
(`--frames`) is a name with `{}` or `{:05d}`, as mmaction's filename_tmpl, for the number, and `*` for any text.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pretrain.data.pack.discover import IMAGE_EXTENSIONS, Item, extension_of
from pretrain.data.pack.originals import refusal
from pretrain.errors import SampleError, StorageError
from pretrain.runtime import storage

logger = logging.getLogger(__name__)

_DIGITS = re.compile(r"[0-9]+")
#: A number in a template: {}, {:d}, {:05d} or {:05}.
_FIELD = re.compile(r"\{(?::0?([0-9]*)d?)?\}")
#: Series that a message names.
SHOWN = 4
MIXED = "frames-mixed"
CHOOSE = ", or choose with --frames, e.g. --frames 'img_{:05d}.jpg'"


@dataclass(frozen=True)
class _Picture:
    """A picture and the numbers in its name that may order it."""

    name: str
    numbers: tuple[int, ...]


def template_pattern(template: str) -> re.Pattern[str]:
    """Compile a template.

    Raises:
        ValueError: it has no number, or is not the name of a file; says what to write.
    """
    pattern, end = "", 0
    for field in _FIELD.finditer(template):
        pattern += _literal(template[end : field.start()]) + f"([0-9]{{{field[1] or 1},}})"
        end = field.end()
    if not end or "/" in template:
        raise ValueError(
            f"{template!r} is no template of a picture's name; write {{}} or {{:05d}} for its number, and * for text "
            "that may be any: 'img_{:05d}.jpg', say"
        )
    return re.compile(pattern + _literal(template[end:]))


def _literal(text: str) -> str:
    if "{" in text or "}" in text:
        raise ValueError(f"{text!r}: a brace that is no number; numbers are {{}}, {{:d}} or {{:05d}}")
    return ".*".join(map(re.escape, text.split("*")))


def select_frames(item: Item, template: str | None = None) -> tuple[list[str], int]:
    """Name the pictures of a frame folder in their order, and count those that are missing between them.

    Raises:
        SampleError: "missing" or "frames-missing" when the folder does not hold what the list or template says, MIXED
            when it holds several series, or does not say how it is ordered.
    """
    try:
        found = storage.find(item.path)
    except StorageError as error:
        raise refusal(error) from error
    # Hidden files are none: `._img_1.jpg`, which macOS leaves beside img_1.jpg, say.
    names = [name for name in found if extension_of(name) in IMAGE_EXTENSIONS and "/" not in name and name[0] != "."]
    if not names:
        raise SampleError("missing", "no such folder, or no pictures in it; relative paths start at --data-root")
    pictures = _one_series(names) if template is None else _matching(names, template)
    pictures.sort(key=lambda picture: picture.numbers)
    for one, next_one in pairwise(pictures):
        if one.numbers == next_one.numbers:
            raise SampleError(MIXED, f"{one.name} and {next_one.name} have the same number; delete one of them{CHOOSE}")
    pictures = _listed(pictures, item)
    missing = _missing(pictures)
    if missing:
        total = len(pictures) + sum(map(len, missing))
        spans = [f"{gap[0]}" if len(gap) == 1 else f"{gap[0]} to {gap[-1]}" for gap in missing[:SHOWN]]
        logger.warning(
            "%s: of %d pictures by their numbers %d are missing (%s%s); the video goes on without them",
            *(item.path, total, total - len(pictures), ", ".join(spans), ", ..." * (len(missing) > SHOWN)),
        )
    return [picture.name for picture in pictures], sum(map(len, missing))


def _listed(pictures: list[_Picture], item: Item) -> list[_Picture]:
    """Take what a list says of a folder: so many, from a number on."""
    if item.frames is None:
        return pictures
    start, total = item.frames
    if start is not None:
        if any(len(picture.numbers) > 1 for picture in pictures):
            raise SampleError(
                MIXED, f"{_series_name(pictures)}: which number the list counts by is open; write {{}} for it, and * "
                "for others, with --frames"
            )  # fmt: skip
        pictures = [one for one in pictures if one.numbers and start <= one.numbers[0] < start + total]
    if len(pictures) < total:
        where = f"numbered from {start}" if start is not None else "in all"
        raise SampleError("frames-missing", f"{len(pictures)} pictures {where}, the list says {total}")
    return pictures[:total]


def _matching(names: list[str], template: str) -> list[_Picture]:
    pattern = template_pattern(template)
    matches = [match for match in map(pattern.fullmatch, names) if match]
    if not matches:
        raise SampleError("frames-missing", f"no picture is named as --frames {template!r}, but {_described(names)}")
    return [_Picture(match.string, tuple(map(int, match.groups()))) for match in matches]


def _one_series(names: list[str]) -> list[_Picture]:
    """Read the numbers of pictures whose names differ in nothing else, as far as they vary.

    Raises:
        SampleError: MIXED, they differ in more, or their numbers in more than one order.
    """
    shapes = {_shape(name) for name in names}
    if len(shapes) == len(names) > 1:
        raise SampleError(MIXED, f"no number orders {', '.join(names[:SHOWN])} ({len(names)} pictures); number them")
    if len(shapes) > 1:
        raise SampleError(MIXED, f"{_described(names)}; give each a folder of its own{CHOOSE}")
    rows = [tuple(map(int, _DIGITS.findall(_stem(name)))) for name in names]
    columns = list(zip(*rows, strict=True))
    varying = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    # Nothing varies: a single picture, whose last number is that which a list counts by.
    chosen = varying or list(range(len(columns)))[-1:]
    pictures = [_Picture(name, tuple(row[place] for place in chosen)) for name, row in zip(names, rows, strict=True)]
    if len(varying) > 1 and not _agree([columns[place] for place in varying]):
        spans = " and ".join(f"{min(columns[place])} to {max(columns[place])}" for place in varying)
        raise SampleError(
            MIXED, f"{_series_name(pictures)}: several numbers vary ({spans}), in no common order; write {{}} for each "
            "that counts, from left to right, and * for others, with --frames"
        )  # fmt: skip
    return pictures


def _agree(columns: Sequence[tuple[int, ...]]) -> bool:
    """Tell whether one number is another for each picture, and all numbers grow with it."""
    by = next((column for column in columns if len(set(column)) == len(column)), None)
    if by is None:
        return False
    order = sorted(range(len(by)), key=by.__getitem__)
    return all(column[one] <= column[two] for column in columns for one, two in pairwise(order))


def _missing(pictures: list[_Picture]) -> list[range]:
    """Find the numbers that are left out of a series that has a step; nothing of one that has none."""
    numbers = [picture.numbers[0] for picture in pictures if len(picture.numbers) == 1]
    steps = [two - one for one, two in pairwise(numbers)]
    if not steps:
        return []
    step, count = min(Counter(steps).items(), key=lambda entry: (-entry[1], entry[0]))
    # Numbers of hand-picked frames, or times in milliseconds, which are a third off every other time.
    if 2 * count <= len(steps):
        return []
    found = [range(one + step, two - step // 2, step) for one, two in pairwise(numbers)]
    return [gap for gap in found if len(gap)]


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _shape(name: str) -> tuple[str, ...]:
    """Return a name without its numbers. IMG_1.JPG and IMG_2.jpg are one camera's."""
    return (*_DIGITS.split(_stem(name)), extension_of(name))


def _series_name(pictures: Sequence[_Picture]) -> str:
    return _template([picture.name for picture in pictures])


def _template(names: Sequence[str]) -> str:
    """Write the template of one series: numbers that vary become fields, of a width where all have it."""
    rows = [_DIGITS.findall(_stem(name)) for name in names]
    pieces = _DIGITS.split(_stem(names[0]))
    text = pieces[0]
    for column, piece in zip(zip(*rows, strict=True), pieces[1:], strict=True):
        widths = {len(digits) for digits in column}
        field = f"{{:0{len(column[0])}d}}" if len(widths) == 1 and len(column[0]) > 1 else "{}"
        text += (column[0] if len(set(column)) == 1 else field) + piece
    return f"{text}.{names[0].rsplit('.', 1)[1]}"


def _described(names: Sequence[str]) -> str:
    """Name the series of pictures, the largest first, with their sizes."""
    series: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        series[_shape(name)].append(name)
    largest = sorted(series.values(), key=lambda one: (-len(one), one[0]))
    shown = [f"{_template(one)} ({len(one)})" for one in largest[:SHOWN]]
    more = f" and {len(series) - SHOWN} more" if len(series) > SHOWN else ""
    kinds = "one series" if len(series) == 1 else f"{len(series)} series"
    return f"{kinds} of pictures: {', '.join(shown)}{more}"
