"""SlowFast's and EVAD's lists of the pictures of videos (`frame_lists/train.csv`).

A header, `original_vido_id video_id frame_id path labels`, then rows of five fields separated by blanks: the video's
name, two numbers, the picture's path, labels that nobody reads. The order of rows is that of frames. Box files of the
same layout are AVA's with a score (ava_files.py). Source: specification, 2.3.
"""

import posixpath
import re
from dataclasses import dataclass

from pretrain.data.boxes.records import read_text
from pretrain.errors import RecipeError

FIELDS = 5
_HEADER = re.compile(r"original_vi\w*_id\s+video_id\s+frame_id\s+path\s+labels\s*")
_NUMBER = re.compile(r"(.*?)(\d+)(\D*?\.\w+)")


@dataclass(frozen=True)
class Pictures:
    """Pictures of a video.

    Attributes:
        folder: that holds them, as the list says it.
        first: number of the first in its name.
        count: how many, numbered without a gap.
        line: of the first in the list.
    """

    folder: str
    first: int
    count: int
    line: int


def is_frame_list(text: str) -> bool:
    """Tell whether a text begins as a frame list does."""
    return _HEADER.match(text) is not None


def read_frame_list(source: str) -> dict[str, Pictures]:
    """Read a frame list: the pictures of each video.

    Raises:
        RecipeError: no header, rows of another width, or a video whose pictures are not one series in one folder: all
            of them, with their lines.
    """
    text = read_text(source)
    if not is_frame_list(text):
        raise RecipeError(f"{source}:1: no frame list; its header is original_vido_id video_id frame_id path labels")
    problems: list[str] = []
    found: dict[str, _Series] = {}
    for number, line in enumerate(text.splitlines()[1:], 2):
        fields = line.split()
        if not fields:
            continue
        try:
            if len(fields) != FIELDS:
                raise ValueError(f"{len(fields)} fields separated by blanks; {FIELDS} are expected")
            if fields[0] in found:
                found[fields[0]].add(fields[3])
            else:
                found[fields[0]] = _Series(number, fields[3])
        except ValueError as error:
            problems.append(f"{source}:{number}: {error}")
    if problems:
        raise RecipeError(problems)
    return {video: Pictures(one.folder, one.first, one.count, one.line) for video, one in found.items()}


class _Series:
    """Pictures of one video so far."""

    def __init__(self, line: int, path: str) -> None:
        self.line, self.count = line, 1
        self.folder, name = posixpath.split(path)
        match = _NUMBER.fullmatch(name)
        if match is None:
            raise ValueError(f"{path!r}: no number in its name")
        self._before, digits, self._behind = f"{path[: len(path) - len(name)]}{match[1]}", match[2], match[3]
        self.first, self._digits = int(digits), len(digits)

    def add(self, path: str) -> None:
        """Add the next one."""
        expected = f"{self._before}{self.first + self.count:0{self._digits}d}{self._behind}"
        # A number that is left out, or listed twice, would show every later keyframe at another time.
        if path != expected:
            raise ValueError(
                f"{path!r}, expected is {expected!r}: the pictures of a video lie in one folder, in order and without "
                "a gap; extract them anew"
            )
        self.count += 1
