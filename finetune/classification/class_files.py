"""Files of class names in every usual form, and what labels mean by them.

    names, one a line                                     Kinetics' csv `id,name`, UCF101's `1 ApplyEyeMakeup`
    ["name", …]   {"name": 0}   {"name": "0"} (Something-Something V2)   {"0": "name"}
    {"id2label": {"0": "name"}}, as in config.json of Hugging Face
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

#: A number of a class, as numbers and as text; `²` is a digit to Python and none to int().
NUMBER = re.compile(r"-?[0-9]+")
_NUMBERED = re.compile(r"(?P<number>[0-9]+)[\s,;:]+(?P<name>\S.*)")
_NUMBERED_BEHIND = re.compile(r"(?P<name>\S.*?)[\s,;:]+(?P<number>[0-9]+)")
_HEADER = re.compile(r"\W*(id|label|index|name|class)\W+(id|label|index|name|class)\W*", re.IGNORECASE)
#: Names or numbers that a message lists.
SHOWN = 5


def read_names(path: str) -> tuple[str, ...]:
    """Read class names in the order of their numbers, from 0 (or, where the file has numbers, from 0 or 1).

    Raises:
        DataError: unreadable, numbers that leave a gap, a name twice, or nothing in it.
    """
    try:
        # -sig: a byte order mark, which spreadsheets write, would become part of the first name.
        text = storage.read_bytes(path).decode("utf-8-sig")
    except StorageError as error:
        raise DataError(f"labels: {path} can't be read ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"labels: {path} is not in UTF-8 ({error}); convert it: iconv -f latin1 -t utf-8") from error
    names = _of_json(path, text) if PurePosixPath(path).suffix == ".json" else _of_lines(path, text)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        found = f"{_listed(twice)} more than once" if twice else "no names"
        raise DataError(f"labels: {path} holds {found}; every class needs a name of its own")
    return names


def _of_lines(path: str, text: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and _HEADER.fullmatch(lines[0]):
        lines = lines[1:]
    for form in (_NUMBERED, _NUMBERED_BEHIND):
        found = [form.fullmatch(line) for line in lines]
        numbers = {int(match["number"]) for match in found if match}
        # All lines, and no gap: a name may begin with a number by itself ("2 people dance").
        if lines and len(numbers) == len(lines) and numbers in (set(range(len(lines))), set(range(1, len(lines) + 1))):
            return _in_order(path, [(match["name"].strip("\"' "), int(match["number"])) for match in found if match])
    return tuple(lines)


def _of_json(path: str, text: str) -> tuple[str, ...]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"labels: {path} is not JSON ({error}); allowed: {_ALLOWED}") from error
    if isinstance(content, dict) and isinstance(content.get("id2label"), dict):
        content = content["id2label"]
    if isinstance(content, list) and all(isinstance(name, (str, int)) for name in content):
        return tuple(map(str, content))
    if isinstance(content, dict) and content:
        for keys, values in ((content.keys(), content.values()), (content.values(), content.keys())):
            if all(is_number(value) for value in values) and all(isinstance(key, str) for key in keys):
                return _in_order(path, [(key, int(value)) for key, value in zip(keys, values, strict=True)])
    raise DataError(f"labels: {path} holds {str(content)[:60]!r}, allowed: {_ALLOWED}")


_ALLOWED = "a list of names, {name: number}, {number: name}, or a config.json with id2label"


def _in_order(path: str, pairs: list[tuple[str, int]]) -> tuple[str, ...]:
    first = min(number for _, number in pairs)
    if first not in (0, 1) or sorted(number for _, number in pairs) != list(range(first, first + len(pairs))):
        last = len(pairs) - 1
        raise DataError(f"labels: {path}: class numbers must be 0 to {last} (or 1 to {last + 1}), each once")
    return tuple(name for name, _ in sorted(pairs, key=lambda pair: pair[1]))


def is_number(value: Any) -> bool:
    """Tell whether a value is a whole number, or text for one; true and false are neither."""
    if isinstance(value, str):
        return NUMBER.fullmatch(value.strip()) is not None
    return not isinstance(value, bool) and isinstance(value, (int, float)) and float(value).is_integer()


def spelt(name: str) -> str:
    """Return a name without what differs between lists of the same classes: spaces around, and Something-Something's
    brackets."""
    return name.strip().replace("[", "").replace("]", "")


def misfits(counts: Mapping[str, int], classes: int, names: tuple[str, ...], where: str) -> list[str]:
    """Compare the labels that occur with the classes there are; none where all fit.

    Args:
        counts: how often each label occurs, numbers as text.
        classes: outputs of the model.
        names: class names; empty where labels are numbers.
        where: of the labels, for the message.
    """
    known = {spelt(name) for name in names}
    words = [label for label in counts if spelt(label) not in known and not is_number(label)]
    numbers = sorted(int(label) for label in counts if spelt(label) not in known and is_number(label))
    problems = []
    if words and names:
        near = difflib.get_close_matches(words[0], names, n=1)
        meant = f"; is {words[0]!r} meant to be {near[0]!r}?" if near else ""
        problems.append(f"{where}: {_listed(words)} are none of the {len(names)} class names{meant}")
    elif words:
        problems.append(
            f"{where}: labels are names ({_listed(words)}), and no class names are known; set labels=auto, or "
            "labels to a file with one name a line"
        )
    outside = [number for number in numbers if not 0 <= number < classes]
    if numbers and outside and numbers[0] == 1 and numbers[-1] == classes:
        problems.append(
            f"{where}: labels run from 1 to {classes}, classes from 0 to {classes - 1}: the last would be lost. Pack "
            f"again with labels from 0, or set model.classes={classes + 1} (class 0 stays empty)"
        )
    elif outside:
        count = sum(counts[label] for label in counts if is_number(label) and not 0 <= int(label) < classes)
        problems.append(
            f"{where}: labels {_listed(outside)} of {count} samples are no classes from 0 to {classes - 1}; "
            f"set model.classes={numbers[-1] + 1}, or correct the labels"
        )
    return problems


def _listed(found: Iterable[Any]) -> str:
    shown = [repr(one) for one in found]
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
