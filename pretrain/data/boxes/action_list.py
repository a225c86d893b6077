"""Label maps: which class ids there are, their names, and the output of a model that stands for each.

| file | form |
|---|---|
| pbtxt of the evaluation list | `item { name: "…" id: 1 }` |
| pbtxt of the action list | `label { name: "…" label_id: 1 label_type: PERSON_MOVEMENT }` |
| `classes.json` | written by `pack.py --task detection`: `{"names": […], "ids": […], "evaluated": […], "groups": …}` |
| text | names, one a line, with ids from 1; or `id name` in each line |

The output of a class is its id - 1 (its id, where ids begin at 0), whatever ids the map leaves out: AVA's models have
80 outputs, of which 60 are evaluated. So no list, however short, shifts a label. Source: specification, 2.2.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pretrain.data.boxes.records import NONE, BoxRecords, read_text
from pretrain.data.media import extension_of
from pretrain.errors import RecipeError
from pretrain.runtime.untrusted import parse_json

#: Outputs of AVA's models, the ids that are not evaluated, and the ids of the last class of each group.
AVA_CLASSES = 80
AVA_LEFT_OUT = frozenset((2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75))
AVA_GROUPS = {"pose": (0, 14), "object": (14, 63), "interaction": (63, 80)}
#: Groups by the second dialect's `label_type`.
TYPES = {"PERSON_MOVEMENT": "pose", "OBJECT_MANIPULATION": "object", "PERSON_INTERACTION": "interaction"}

_BLOCK = re.compile(r"\b(item|label)\s*:?\s*\{(.*?)\}", re.DOTALL)
#: A field of a block; a text in quotes may hold a brace, which is why it is taken out of the text first.
_FIELD = re.compile(r"(\w+)\s*:\s*(\x00\d+\x00|[^\s{}]+)")
_QUOTED = re.compile(r'"((?:[^"\\\n]|\\.)*)"|\'((?:[^\'\\\n]|\\.)*)\'')
_NUMBERED = re.compile(r"(?P<id>\d+)[\s,;:]+(?P<name>\S.*)")


@dataclass(frozen=True)
class ActionList:
    """Classes of a data set.

    Attributes:
        names: by id, ascending.
        outputs: outputs of a model, K.
        first: id of output 0.
        groups: [from, to) of outputs, by group; None where there are none.
        evaluated: ids that count in the mean.
    """

    names: Mapping[int, str]
    outputs: int
    first: int = 1
    groups: Mapping[str, tuple[int, int]] | None = None
    evaluated: frozenset[int] = frozenset()

    @property
    def ids(self) -> range:
        """Ids of the outputs, in order."""
        return range(self.first, self.first + self.outputs)

    @property
    def unnamed(self) -> list[int]:
        """Ids of outputs that the map leaves out."""
        return [one for one in self.ids if one not in self.names]

    def name(self, output: int) -> str:
        """Name an output; one that the map leaves out by its id."""
        return self.names.get(output + self.first, f"class {output + self.first}")

    def to_json(self) -> bytes:
        """Write `classes.json`."""
        content = {
            "names": [self.name(output) for output in range(self.outputs)],
            "ids": list(self.ids),
            "evaluated": [one - self.first for one in self.ids if one in self.evaluated],
            "groups": None if self.groups is None else {name: list(span) for name, span in self.groups.items()},
        }
        return json.dumps(content, indent=1, ensure_ascii=False).encode()


def make_action_list(source: str, names: Mapping[int, str], types: Mapping[int, str] | None = None) -> ActionList:
    """Build a map of names by id.

    Args:
        source: for messages.
        names: by id.
        types: `label_type` by id, of those that have one.

    Raises:
        RecipeError: no classes, a negative id, or a name twice.
    """
    if not names:
        raise RecipeError(f"{source}: holds no classes; expected are blocks item {{ name: \"…\" id: 1 }}, or names")
    if min(names) < 0:
        raise RecipeError(f"{source}: class id {min(names)} ({names[min(names)]!r}); ids are 0 or more")
    first = 0 if 0 in names else 1
    names = dict(sorted(names.items()))
    # AVA's evaluation list: all that it leaves out is known.
    ava = set(names) == set(range(1, AVA_CLASSES + 1)) - AVA_LEFT_OUT
    groups = _groups(names, types or {}, first)
    return ActionList(names, max(names) + 1 - first, first, AVA_GROUPS if ava else groups, frozenset(names))


def _groups(names: Mapping[int, str], types: Mapping[int, str], first: int) -> dict[str, tuple[int, int]] | None:
    """Find the groups of outputs; None where types are missing, or the classes of one are not next to each other."""
    if not types or set(types) != set(names):
        return None
    spans: dict[str, tuple[int, int]] = {}
    for one in names:
        group = TYPES.get(types[one], types[one])
        if group in spans and spans[group][1] != one - first:
            return None
        spans[group] = spans.get(group, (one - first, 0))[0], one - first + 1
    return spans


def is_ava(labels: ActionList) -> bool:
    """Tell whether the ids left out by a map are AVA's, which are trained and not evaluated."""
    return labels.outputs == AVA_CLASSES and set(labels.unnamed) == AVA_LEFT_OUT


def read_action_list(source: str) -> ActionList:
    """Read a label map in any of the forms above, told apart by what it holds.

    Raises:
        RecipeError: something else; an id or a name twice; a class without one of them: with the line.
    """
    text = read_text(source)
    if extension_of(source) == "json":
        return _of_json(source, text)
    bare, texts = _without_quotes(text)
    return _of_blocks(source, bare, texts) if _BLOCK.search(bare) else _of_lines(source, text)


def _without_quotes(text: str) -> tuple[str, list[str]]:
    texts: list[str] = []

    def taken(match: re.Match[str]) -> str:
        texts.append(re.sub(r"\\(.)", r"\1", match[1] if match[1] is not None else match[2]))
        return f"\x00{len(texts) - 1}\x00"

    return _QUOTED.sub(taken, re.sub(r"(?m)^\s*#.*$", "", text)), texts


def _of_blocks(source: str, bare: str, texts: list[str]) -> ActionList:
    names: dict[int, str] = {}
    types: dict[int, str] = {}
    problems: list[str] = []
    for match in _BLOCK.finditer(bare):
        where = f"{source}:{bare.count(chr(10), 0, match.start()) + 1}"
        fields: dict[str, str] = dict(_FIELD.findall(match[2]))
        number, name = fields.get("id", fields.get("label_id", "")), fields.get("name", "")
        if not re.fullmatch(r"-?\d+", number) or not name:
            problems.append(f'{where}: a class needs name: "…" and id: or label_id: with a number; found {fields}')
            continue
        named = texts[int(name.strip("\x00"))] if name.startswith("\x00") else name
        problems += _twice(where, names, int(number), named)
        names[int(number)] = named
        if "label_type" in fields:
            types[int(number)] = fields["label_type"]
    if problems:
        raise RecipeError(problems)
    return make_action_list(source, names, types)


def _twice(where: str, names: Mapping[int, str], number: int, name: str) -> list[str]:
    if number in names:
        return [f"{where}: id {number} ({name!r}) is that of {names[number]!r}; every class has an id of its own"]
    if name in names.values():
        return [f"{where}: {name!r} is named already; every class has a name of its own"]
    return []


def _of_lines(source: str, text: str) -> ActionList:
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    matches = [_NUMBERED.fullmatch(line) for _, line in lines]
    names: dict[int, str] = {}
    problems: list[str] = []
    numbered = all(matches)
    for place, ((line, name), match) in enumerate(zip(lines, matches, strict=True), 1):
        # All lines or none: a name may begin with a number by itself.
        number, name = (int(match["id"]), match["name"].strip("\"'")) if numbered and match else (place, name)
        problems += _twice(f"{source}:{line}", names, number, name)
        names[number] = name
    if problems:
        raise RecipeError(problems)
    return make_action_list(source, names)


def _of_json(source: str, text: str) -> ActionList:
    try:
        content = parse_json(text)
        names = [str(name) for name in content["names"]]
        ids = [int(one) for one in content["ids"]]
        evaluated = frozenset(ids[int(output)] for output in content["evaluated"])
        groups = content.get("groups")
        spans = None if groups is None else {str(name): (int(a), int(b)) for name, (a, b) in groups.items()}
        if not ids or ids != list(range(ids[0], ids[0] + len(ids))) or len(names) != len(ids) or ids[0] not in (0, 1):
            raise ValueError(f"{len(names)} names and {len(ids)} ids; as many are expected, from 0 or 1 on")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RecipeError(
            f"{source}: not the classes.json of a data set ({type(error).__name__}: {error}); expected are names, ids "
            "and evaluated, as pack.py --task detection writes them"
        ) from error
    # A name that to_json made up is none.
    named = {one: name for one, name in zip(ids, names, strict=True) if name != f"class {one}" or one in evaluated}
    return ActionList(named, len(ids), ids[0], spans, evaluated)


def named_classes(source: str, names: Iterable[str]) -> ActionList:
    """Build the map of names that a file writes in its rows: in the order of the alphabet, ids from 1."""
    return make_action_list(source, dict(enumerate(sorted(set(names)), 1)))


def number_names(records: BoxRecords, classes: ActionList) -> BoxRecords:
    """Give rows that write names of classes the ids of a list; -2, which no list has, where it lacks the name."""
    if records.names is None:
        return records
    ids = {name: one for one, name in classes.names.items()}
    table = np.array([*(ids.get(name, -2) for name in records.names), NONE])
    return replace(records, labels=table[records.labels], names=None)


def parse_groups(text: str, outputs: int) -> dict[str, tuple[int, int]]:
    """Parse `pose:14,object:49,interaction:17`: groups of outputs by their sizes, in order.

    Raises:
        ValueError: something else, or sizes that don't add up to the outputs.
    """
    spans: dict[str, tuple[int, int]] = {}
    begin = 0
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if not name or not size.isdecimal() or int(size) < 1 or name in spans:
            raise ValueError(f"{part!r}: expected NAME:CLASSES, separated by commas, e.g. pose:14,object:49")
        spans[name] = begin, begin + int(size)
        begin += int(size)
    if begin != outputs:
        raise ValueError(f"{text}: {begin} classes in all, the label map has {outputs}")
    return spans
