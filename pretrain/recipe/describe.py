"""Self-description of the schema: the text under a field, the values it allows, all keys there are."""

import ast
import dataclasses
import difflib
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Read the string literal under each field of a dataclass, in one line, by field name.

    Python drops these strings at run time, so they are read from the source; inherited fields keep theirs. Fields
    without one are left out.
    """
    docs = {
        name: text
        for base in cls.__bases__
        if dataclasses.is_dataclass(base)
        for name, text in field_docs(base).items()
    }
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolve the annotation of each field, by name."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def allowed_values(annotation: Any) -> str:
    """Describe in words what a field of this annotation accepts."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        choices = [allowed_values(argument) for argument in arguments if argument is not types.NoneType]
        return " or ".join([*choices, "null"] if types.NoneType in arguments else choices)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {allowed_values(arguments[0])}"
    if origin is list:
        return f"a list, each {allowed_values(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(annotation):
        return "a section of key: value lines"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def all_keys(cls: type, components: dict[str, type] | None = None, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys below a dataclass; those of named entries carry `<name>`, as in data.sources.<name>.shards.

    Args:
        components: dataclasses of the sections that the schema leaves open, by their dotted key.
    """
    for name, annotation in field_types(cls).items():
        key = prefix + name
        below = (components or {}).get(key, annotation)
        if get_origin(below) is dict:
            below, key = get_args(below)[1], f"{key}.<name>"
        if dataclasses.is_dataclass(below):
            yield from all_keys(below, components, f"{key}.")  # type: ignore[arg-type]
        else:
            yield key


def suggestion(found: str, allowed: Sequence[str]) -> str:
    """Suggest the nearest allowed name (`; did you mean 'x'?`), else list all that is allowed."""
    near = difflib.get_close_matches(found, allowed, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return "; there is: " + ", ".join(allowed) if allowed else ""


#: What other programs call our keys, with and without a section.
NAMES_ELSEWHERE = {
    "batch.size": "batch.samples",
    "batch_size": "batch.samples",
    "num_workers": "data.workers",
    "num_frames": "input.frames",
    "sampling_rate": "input.stride",
    "num_classes": "model.classes",
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "output_dir": "run.dir",
}


def key_suggestion(key: str, siblings: Sequence[str], keys: Sequence[str]) -> str:
    """Suggest the same for a dotted key: what other programs call so, a sibling of nearly its name, then the same last
    part in other sections."""
    last = key.rpartition(".")[2]
    ours = NAMES_ELSEWHERE.get(key) or NAMES_ELSEWHERE.get(last)
    if ours in keys:
        return f"; did you mean {ours!r}?"
    near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    elsewhere = [other for other in keys if other.rpartition(".")[2] == last]
    elsewhere += [other for other in keys if last in other.rpartition(".")[2].split("_")]
    if elsewhere:
        return "; did you mean " + " or ".join(repr(other) for other in dict.fromkeys(elsewhere[:3])) + "?"
    return suggestion(last, siblings)
