"""Files that go along with a sample's main one, as members of the same sample (pack.py --with).

`--with txt,boxes.json,sound`: for a row of a manifest that has a column of that name, the column's value: the path of a
file if it ends like one of a known kind, else the value itself, text as `<column>.txt` and anything else as
`<column>.json`. For all other items the file of the same stem with that ending; with `mask.png=FOLDER` the file of the
same path below that folder, as data sets keep masks (images/train/1.jpg, annotations/train/1.png), as `mask.png`.
"""

import json
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.data.media import extension_of, kind_of
from pretrain.data.pack.contents import describe
from pretrain.data.pack.originals import fetch_whole
from pretrain.errors import SampleError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json


@dataclass(frozen=True)
class Companion:
    """One further member.

    Attributes:
        ending: of the member, what follows the first dot of its name: "txt", "boxes.json", "sound.wav".
        path: of the file; "" where the value was given in the list.
        value: given in the list.
    """

    ending: str
    path: str = ""
    value: Any = None


def beside(path: str, names: Sequence[str], inside: str = "") -> tuple[Companion, ...]:
    """Name the files of the same stem as `path`; whether they are there shows when the sample is packed.

    Args:
        path: of the main file.
        names: endings, or `ending=FOLDER`.
        inside: path below its source, which a companion has below its folder; "": the file's name.
    """
    stem, below = (
        posixpath.splitext(one)[0] if kind_of(one) else one  # a folder of frames may have a dot in its name
        for one in (path, inside or posixpath.basename(path))
    )
    found = []
    for name in names:
        ending, _, folder = name.partition("=")
        elsewhere = storage.join(folder, f"{below}.{extension_of(f'.{ending}') or ending}") if folder else ""
        # Readers know endings in small letters; the file's may have others.
        found.append(Companion(ending.lower(), elsewhere or f"{stem}.{ending}"))
    return tuple(found)


def from_row(
    row: dict[str, Any], path: str, names: Sequence[str], rooted: Callable[[str], str]
) -> tuple[Companion, ...]:
    """Take the companions of a manifest's row out of it.

    Args:
        row: the columns; those that become companions are removed.
        path: of the row's main file.
        names: asked for.
        rooted: puts the data root in front of a relative path.
    """
    columns = [name for name in names if name in row]
    # Removed from the row, or a file of its own would stand in the json's meta as well.
    found = [_from_column(name, row.pop(name), rooted) for name in columns]
    return (*found, *beside(path, [name for name in names if name not in columns]))


def _from_column(column: str, value: Any, rooted: Callable[[str], str]) -> Companion:
    name = column.lower()
    # A text of several lines is no path, whatever it ends like.
    if isinstance(value, str) and "\n" not in value and (kind_of(value) or extension_of(value) == "json"):
        ending = extension_of(value)
        return Companion(ending if ending == name else f"{name}.{ending}", rooted(value))
    if isinstance(value, str):
        if not _is_json(value):
            return Companion(f"{name}.txt", value=value)
        value = parse_json(value)
    return Companion(f"{name}.json", value=value)


def _is_json(text: str) -> bool:
    """Tell whether a csv's text is a list or an object, boxes for example."""
    try:
        return text.lstrip().startswith(("[", "{")) and parse_json(text) is not None
    except ValueError:
        return False


def read_companion(companion: Companion) -> bytes:
    """Read its content, verified by what its ending says that it is.

    Raises:
        SampleError: "companion" where it is missing, empty or damaged.
        DataError: the store does not answer.
    """
    try:
        data = fetch_whole(companion.path) if companion.path else _written(companion.value)
        describe(companion.ending, data)
        return data
    except SampleError as error:
        raise SampleError("companion", f"{companion.path or companion.ending}: {error}") from error


def _written(value: Any) -> bytes:
    """Write a value of a list as a file's content."""
    if value is None:
        raise SampleError("missing", "the list says null")
    # Sorted, so that a list with its fields in another order packs the same bytes.
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SampleError("damaged", f"the list's text is no Unicode: {error}") from error
