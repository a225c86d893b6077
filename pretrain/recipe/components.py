"""Models and objectives, found by their file name: a new one is a new file, nothing is registered."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Literal

from pretrain.errors import RecipeError
from pretrain.recipe.describe import suggestion

Kind = Literal["models", "objectives"]


def component_names(kind: Kind) -> list[str]:
    """Files of pretrain/<kind>/ that can be named in a recipe: those that define a `Config`."""
    package = importlib.import_module(f"pretrain.{kind}")
    names = []
    for module in pkgutil.iter_modules(package.__path__):
        source = Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
        # Read, not imported: a broken or heavy sibling must not keep a recipe from loading.
        if source.is_file() and "\nclass Config" in source.read_text(encoding="utf-8"):
            names.append(module.name)
    return sorted(names)


def load_component(kind: Kind, name: str) -> ModuleType:
    """Import pretrain/<kind>/<name>.py.

    Raises:
        RecipeError: there is no such file, or it has no `Config`.
    """
    names = component_names(kind)
    if name not in names:
        section = kind.removesuffix("s")
        raise RecipeError(f"no {section} {name!r} in pretrain/{kind}/{suggestion(name, names)}")
    return importlib.import_module(f"pretrain.{kind}.{name}")
