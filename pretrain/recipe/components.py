"""Components of a recipe, found by their file's name: a new one is a new file, nothing is registered.

A component is a file with `Config`, a dataclass of its section's keys, and, but for inputs, `METHOD` or `ARCHITECTURE`.
A pattern such as `pretrain.models.{}` or `finetune.{}.task` says where the files of a section lie.
"""

import importlib
import pkgutil
from types import ModuleType

from pretrain.errors import RecipeError
from pretrain.recipe.describe import suggestion
from pretrain.recipe.schema import Input


def load_component(section: str, name: str, pattern: str) -> ModuleType:
    """Import the file that a section of a recipe names.

    Args:
        section: of the recipe, for the error.
        name: what its `name:` says.
        pattern: module, with {} for the name.

    Raises:
        RecipeError: there is no such file, or it is no component.
    """
    module = _import(name, pattern)
    if module is None or not _is_component(module):
        folder = pattern.partition(".{}")[0].replace(".", "/")
        raise RecipeError(f"no {section} {name!r} in {folder}/{suggestion(name, component_names(pattern))}")
    return module


def component_names(pattern: str) -> list[str]:
    """List the names that a recipe can give: components only. Imports them all, so it is for errors and documents."""
    package = importlib.import_module(pattern.partition(".{}")[0])
    found = {info.name: _import_any(info.name, pattern) for info in pkgutil.iter_modules(package.__path__)}
    return sorted(name for name, module in found.items() if module is not None and _is_component(module))


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
