"""A recipe as text: the resolved values as YAML, each with its meaning and unit. The text is itself a recipe."""

import dataclasses
from typing import Any

import yaml

from pretrain.recipe.describe import field_docs
from pretrain.recipe.schema import Recipe

#: Column that the comments start in, where the value leaves room.
COMMENT_COLUMN = 44


def show_recipe(recipe: Recipe) -> str:
    """Show the resolved recipe as YAML with a comment for every key; `load_recipe` reads it back to an equal Recipe."""
    lines = [f"# {recipe.run.name}, resolved. Every key there is; this text is itself a recipe."]
    schema: type = type(recipe)
    for field in dataclasses.fields(recipe):
        section = getattr(recipe, field.name)
        about = field_docs(schema).get(field.name) or _class_line(section)
        if not dataclasses.is_dataclass(section):
            lines.append(_with_comment(f"{field.name}: {_scalar(section)}", about))
            continue
        lines += ["", f"# {about}", f"{field.name}:", *_section_lines(section, "  ")]
    return "\n".join(lines) + "\n"


def _section_lines(section: Any, indent: str) -> list[str]:
    schema: type = type(section)
    docs = field_docs(schema)
    lines = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        comment = docs.get(field.name, "")
        if isinstance(value, dict) and value:
            lines.append(_with_comment(f"{indent}{field.name}:", comment))
            for name, entry in value.items():
                lines += [f"{indent}  {_scalar(name)}:", *_section_lines(entry, indent + "    ")]
        elif dataclasses.is_dataclass(value):
            lines += [_with_comment(f"{indent}{field.name}:", comment), *_section_lines(value, indent + "  ")]
        else:
            lines.append(_with_comment(f"{indent}{field.name}: {_scalar(value)}", comment))
    return lines


def _with_comment(text: str, comment: str) -> str:
    return f"{text.ljust(COMMENT_COLUMN)}  # {comment}" if comment else text


def _scalar(value: Any) -> str:
    """Format one value in YAML's flow style, on one line."""
    if isinstance(value, tuple):
        value = list(value)
    if type(value) is bool or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if type(value) is int:
        return str(value)
    # Wide: the lines that a long value is folded into would not have the section's indent.
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    # A bare scalar is followed by the mark for the end of a document.
    return text.removesuffix("\n").removesuffix("\n...")


def _class_line(section: Any) -> str:
    return (type(section).__doc__ or "").strip().partition("\n")[0]
