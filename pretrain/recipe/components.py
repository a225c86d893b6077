"""Components of a recipe, found by their file's name: a new one is a new file, nothing is registered.

A component is a file with `Config`, a dataclass of its section's keys, and, but for inputs, `METHOD` or `ARCHITECTURE`.
A pattern such as `pretrain.models.{}` or `finetune.{}.task` says where the files of a section lie.
"""

import dataclasses
import importlib
import pkgutil
import traceback
from types import ModuleType

from pretrain.errors import RecipeError
from pretrain.recipe.describe import suggestion
from pretrain.recipe.schema import Input

#: Section of a recipe -> name that its components give their class, and module and name of the class's base.
ENTRIES = {
    "objective": ("METHOD", "pretrain.objectives.base", "Method"),
    "model": ("ARCHITECTURE", "pretrain.models.base", "Architecture"),
}


def load_component(section: str, name: str, pattern: str) -> ModuleType:
    """Import the file that a section of a recipe names.

    Args:
        section: of the recipe, for the error.
        name: what its `name:` says.
        pattern: module, with {} for the name.

    Raises:
        RecipeError: there is no such file, it is no component, or it can't be imported.
    """
    try:
        module = _import(name, pattern)
    except SyntaxError as error:
        raise RecipeError(f"{section} {name!r}: {error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever the file does when it is imported
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{where.filename}:{where.lineno}: {type(error).__name__}: {error}"
        raise RecipeError(f"{section} {name!r} can't be imported: {told}") from error
    folder = pattern.partition(".{}")[0].replace(".", "/")
    if module is None:
        raise RecipeError(f"no {section} {name!r} in {folder}/{suggestion(name, component_names(pattern))}")
    if lacking := _lacking(section, module):
        likely = suggestion(name, component_names(pattern))
        raise RecipeError(f"no {section} {name!r} in {folder}/: {pattern.format(name)} has no {lacking}{likely}")
    if wrong := _wrong_class(section, module):
        raise RecipeError(f"{section} {name!r}: {wrong}")
    return module


def component_names(pattern: str) -> list[str]:
    """List the names that a recipe can give: components only. Imports them all, so it is for errors and documents."""
    package = importlib.import_module(pattern.partition(".{}")[0])
    found = {info.name: _import_any(info.name, pattern) for info in pkgutil.iter_modules(package.__path__)}
    return sorted(name for name, module in found.items() if module is not None and _is_component(module))


def _lacking(section: str, module: ModuleType) -> str:
    """Say what a file would need to be a component of this section; nothing where it is one."""
    if section == "input":
        return "" if _is_component(module) else "`Config`, a dataclass of its own that inherits from schema.Input"
    entry = ENTRIES[section][0] if section in ENTRIES else None
    if entry and not isinstance(getattr(module, entry, None), type):
        return f"`{entry}`, the class of this {section}"
    return "" if dataclasses.is_dataclass(getattr(module, "Config", None)) else "`Config`, a dataclass of its keys"


def _wrong_class(section: str, module: ModuleType) -> str:
    """Say what keeps a component's class from being used; nothing where it is a complete one."""
    if section not in ENTRIES:
        return ""
    entry, room, base = ENTRIES[section]
    chosen = getattr(module, entry)
    # By its name, as components are found: this room knows nothing of methods and models.
    if not issubclass(chosen, getattr(importlib.import_module(room), base)):
        return f"{entry} is {chosen.__name__}, allowed: a subclass of {room}.{base}"
    absent = ", ".join(sorted(chosen.__abstractmethods__))
    return f"{chosen.__name__} does not define {absent}" if absent else ""


def _is_component(module: ModuleType) -> bool:
    """Tell a component from a file beside it: it has a `Config`, and a class to be built from it, or is an input.

    A `Config` alone says nothing: files that read or write a model's weights import one.
    """
    config = getattr(module, "Config", None)
    if hasattr(module, "ARCHITECTURE") or hasattr(module, "METHOD"):
        return config is not None
    return isinstance(config, type) and issubclass(config, Input) and config.__module__ == module.__name__


def _import(name: str, pattern: str) -> ModuleType | None:
    """Import the module; None where there is no such file. An import that fails inside it is an error of that file."""
    # The name becomes part of a module's path: with a dot it would lead to something inside another file.
    if not name.isidentifier():
        return None
    wanted = pattern.format(name)
    try:
        return importlib.import_module(wanted)
    except ModuleNotFoundError as error:
        # Only where the component itself is missing: a library that it needs and that is not installed has to be named.
        if error.name is not None and (wanted == error.name or wanted.startswith(f"{error.name}.")):
            return None
        raise


def _import_any(name: str, pattern: str) -> ModuleType | None:
    try:
        return _import(name, pattern)
    except Exception:  # a broken sibling must not hide the names of the others
        return None
