"""List files of the official VideoMAE repositories: space separated, no header, one video a line.

| `--list-format` | columns | meaning | official use |
|---|---|---|---|
| v1 | `path label` | video; `.mp4` is appended to a path without extension | V1, and fine-tuning on videos |
| v2 | `path 0 -1` | video | V2 pre-training |
| v2 | `folder start total` | frames numbered start … start + total - 1 | V2 pre-training on frames |
| frames | `folder total label` | the first `total` frames | V2 fine-tuning on frames (SSv2) |

Sources: `kinetics.py`, `ssv2.py` of VideoMAE V1; `dataset/pretrain_datasets.py`, `dataset/datasets.py` of VideoMAE V2.
Unlike there, paths may hold spaces: columns are counted from the right.
"""

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.errors import RecipeError

ListFormat = Literal["auto", "v1", "v2", "frames"]

_V1 = re.compile(r"(?P<path>.+?)\s+(?P<label>-?\d+)")
_THREE = re.compile(r"(?P<path>.+?)\s+(?P<a>-?\d+)\s+(?P<b>-?\d+)")
_V2 = re.compile(_THREE.pattern + r"(\s.*)?")  # V2 ignores further columns


#: Lines of other lists than these, which would be taken for paths: their look, and what to do.
_FOREIGN = (
    (re.compile(r".*\.\w+\s*[,|;]\s*\S.*"),
     "columns separated by a comma, pipe or semicolon: separate path and label by a space, or write a csv with the "
     "header path,label"),
    (re.compile(r".*\\.*"), "backslashes: write paths with /"),
    (re.compile(r"(?i)[\"']?(path|file|filename|file_name|video|video_id|video_path|name|id)[\"']?\s*[,|;\t ]\s*"
                r"[\"']?(label|class|category|target|action|class_id|label_id)\b.*"),
     "a header: its columns must be called path and label to be read as a csv"),
)  # fmt: skip


@dataclass(frozen=True)
class ListLine:
    """One line: what to read and its label."""

    path: str
    name: str
    label: int | None
    frames: tuple[int | None, int] | None
    is_folder: bool


def parse_list(where: str, text: str, list_format: ListFormat = "auto") -> list[ListLine]:
    """Read a list file; empty lines are passed over.

    Args:
        where: name of the file, for messages.
        text: its content.
        list_format: which columns to expect; auto tells them apart where the line itself does.

    Raises:
        RecipeError: every wrong line as `file:line: what is wrong; what to do`.
    """
    read = {"auto": _auto, "v1": _v1, "v2": _v2, "frames": _frames}[list_format]
    return _all_lines(where, text, read)


def _all_lines(where: str, text: str, read: Callable[[str], ListLine]) -> list[ListLine]:
    lines: list[ListLine] = []
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            if foreign := next((advice for look, advice in _FOREIGN if look.fullmatch(line.strip())), None):
                raise ValueError(f"this looks like {foreign}")
            lines.append(read(line.strip()))
        except ValueError as error:
            problems.append(f"{where}:{number}: {line.strip()[:120]!r}: {error}")
    if problems:
        raise RecipeError(problems)
    if not lines:
        raise RecipeError(f"{where}: holds no line; one video a line is expected, as `path label` or `path 0 -1`")
    return lines


def _auto(line: str) -> ListLine:
    three = _THREE.fullmatch(line)
    if three is None:
        return _v1(line) if " " in line or "\t" in line else _video(line, None)
    # No class is negative: -1 in the last column can only be V2's mark of a video.
    if int(three["b"]) < 0:
        return _v2(line)
    raise ValueError(
        "the columns can mean `folder start total` (pre-training) or `folder total label` (fine-tuning): "
        "say which with --list-format v2 or --list-format frames"
    )


def _v1(line: str) -> ListLine:
    match = _V1.fullmatch(line)
    if match is None:
        raise ValueError(
            "expected `path label` with a class number; for class names write a csv with columns path,label"
        )
    return _video(match["path"], int(match["label"]))


def _v2(line: str) -> ListLine:
    match = _V2.fullmatch(line)
    if match is None:
        raise ValueError("expected `path 0 -1` for a video or `folder start total` for frames")
    start, total = int(match["a"]), int(match["b"])
    if total < 0:
        return _video(match["path"], None)
    if total == 0:
        raise ValueError("0 frames; the third column is the number of frames, or -1 for a video file")
    return ListLine(match["path"], match["path"], None, (start, total), True)


def _frames(line: str) -> ListLine:
    match = _THREE.fullmatch(line)
    if match is None:
        raise ValueError("expected `folder total label`, two numbers after the folder")
    total, label = int(match["a"]), int(match["b"])
    if total < 1:
        raise ValueError(f"{total} frames; the second column is the number of frames; for videos use --list-format v2")
    return ListLine(match["path"], match["path"], label, (None, total), True)


def _video(path: str, label: int | None) -> ListLine:
    whole = path if posixpath.splitext(path)[1] else path + ".mp4"
    return ListLine(whole, whole, label, None, False)
