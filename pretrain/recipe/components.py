"""Models and objectives, found by their file name: a new one is a new file, nothing is registered."""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Literal

from pretrain.errors import RecipeError
from pretrain.recipe.describe import suggestion
from pretrain.recipe.schema import Recipe

Kind = Literal["models", "objectives"]


def component_names(kind: Kind, package_name: str | None = None) -> list[str]:
    """Files of a package, by default pretrain/<kind>/, that can be named in a recipe: those that define a `Config`."""
    package = importlib.import_module(package_name or f"pretrain.{kind}")
    names = []
    for module in pkgutil.iter_modules(package.__path__):
        source = Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
        # Read, not imported: a broken or heavy sibling must not keep a recipe from loading.
        if source.is_file() and "\nclass Config" in source.read_text(encoding="utf-8"):
            names.append(module.name)
    return sorted(names)


def load_component(kind: Kind, name: str, package_name: str | None = None) -> ModuleType:
    """Import <name>.py of a package, by default pretrain/<kind>/.

    Raises:
        RecipeError: there is no such file, or it has no `Config`.
    """
    package_name = package_name or f"pretrain.{kind}"
    names = component_names(kind, package_name)
    if name not in names:
        section, folder = kind.removesuffix("s"), package_name.replace(".", "/")
        raise RecipeError(f"no {section} {name!r} in {folder}/{suggestion(name, names)}")
    return importlib.import_module(f"{package_name}.{name}")


def objective_file(recipe: Recipe) -> ModuleType:
    """The file that the recipe's `objective.name` names."""
    return load_component("objectives", recipe.objective.name, type(recipe).OBJECTIVES)
