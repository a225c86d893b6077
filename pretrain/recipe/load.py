"""Reading of a recipe: from its name and `key=value` words to a typed Recipe, all that is wrong reported at once."""

import copy
import functools
import os
import types
from dataclasses import dataclass, field, is_dataclass
from types import ModuleType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pretrain.errors import RecipeError
from pretrain.recipe.components import component_names, load_component
from pretrain.recipe.describe import all_keys, allowed_values, field_types, key_suggestion
from pretrain.recipe.files import RECIPES, Layer, override_layer, read_layers, recipe_path
from pretrain.recipe.schema import Recipe

#: Sections whose schema is the `Config` of the file that they name; the objective says which input it takes.
COMPONENTS = ("model", "objective", "input")
#: Keys of earlier releases, and where they are now.
MOVED = {f"data.{key}": f"input.{key}" for key in ("frames", "stride", "height", "width", "views", "crop", "decoder",
                                                   "grid")}  # fmt: skip


@dataclass
class Reading:
    """Result of reading a recipe: `recipe` is complete where nothing is wrong."""

    recipe: Recipe | None = None
    problems: list[str] = field(default_factory=list)
    bad_keys: set[str] = field(default_factory=set)

    def add(self, key: str, problem: str) -> None:
        self.problems.append(problem)
        self.bad_keys.add(key)


def load_recipe(name_or_path: str, overrides: list[str] | None = None, schema: type[Recipe] = Recipe) -> Recipe:
    """Load `recipes/<name>.yaml`, or the file at a path, with overrides, types checked and presets filled in.

    `recipe.model`, `recipe.objective` and `recipe.input` are instances of the `Config` of the files that they name.

    Args:
        name_or_path: a name in recipes/, or a path (anything with a slash or ending in .yaml).
        overrides: `dotted.key=value` words; values are YAML.
        schema: what kind of run, `Recipe` or a subclass.

    Raises:
        RecipeError: its `problems` holds everything found: unknown keys, wrong types, missing values.
    """
    reading = read_recipe(name_or_path, overrides, schema)
    if reading.problems or reading.recipe is None:
        raise RecipeError(reading.problems)
    return reading.recipe


def read_recipe(name_or_path: str, overrides: list[str] | None = None, schema: type[Recipe] = Recipe) -> Reading:
    """Read a recipe as `load_recipe` does, but one with bad values still comes back, with defaults in their place.

    So cross-field checks can be reported together with the bad values. `recipe` is None where a section can't be built.
    """
    reading = Reading()
    try:
        layers = read_layers(name_or_path, schema.FOLDER)
    except RecipeError as error:
        return Reading(problems=error.problems)
    from_command_line, wrong_words = override_layer(overrides or [])
    layers.append(from_command_line)
    reading.problems += wrong_words
    elsewhere = _other_program(layers, schema)
    if elsewhere:  # nearly every other line would be wrong too, and none of them is the reason
        return Reading(problems=[elsewhere])
    config = _structured(schema)
    modules = _open_components(config, schema, layers, reading)
    for layer in layers:
        _Merge(config, layer, reading).mapping("", layer.content)
    # Unresolved: a `${...}` that leads nowhere is reported below, with its place.
    if not OmegaConf.to_container(config.run, resolve=False)["name"]:  # type: ignore[index,call-overload]
        config.run.name = recipe_path(name_or_path, folder=schema.FOLDER).stem
    if _check_values(config, layers, reading) and len(modules) == len(COMPONENTS):
        reading.recipe = _to_object(config, modules, reading)
    return reading


def _other_program(layers: list[Layer], schema: type[Recipe]) -> str | None:
    """Say that a recipe is for another command than those that take this schema; None where it is for them."""
    for layer in layers:
        found = layer.content.get("program", schema.program)
        if found == schema.program:
            continue
        where, ours = layer.where("program"), f"recipes of launch/{schema.program}.py are taken here"
        if (RECIPES.parent / "launch" / f"{found}.py").is_file():
            return f"{where}: found {found!r}: a recipe of launch/{found}.py, which runs it; {ours}"
        return f"{where}: found {found!r}, allowed: {schema.program} ({ours})"
    return None


def _open_components(
    config: DictConfig, schema: type[Recipe], layers: list[Layer], reading: Reading
) -> dict[str, ModuleType]:
    """Put the schema of the named model, objective and input into the configuration."""
    modules: dict[str, ModuleType] = {}
    patterns = {"model": "pretrain.models.{}", "objective": schema.METHODS, "input": "pretrain.samples.{}"}
    # In this order: which input is the default only the objective knows.
    for section in COMPONENTS:
        naming = [layer for layer in layers if "name" in _mapping(layer.content.get(section))]
        by_default = section == "input" and "objective" in modules and not naming
        if not naming and not by_default:
            if section != "input":  # where the objective is unknown, so is its input
                there = ", ".join(component_names(patterns[section]))
                folder = patterns[section].partition(".{}")[0].replace(".", "/")
                reading.add(section, f"{section}.name: missing; name one of {folder}/: {there}")
            else:
                reading.bad_keys.add(section)
            continue
        # The method's own input where none is named, so that no recipe has to repeat it.
        name = str(modules["objective"].METHOD.INPUT if by_default else naming[-1].content[section]["name"])
        try:
            modules[section] = load_component(section, name, patterns[section])
        except RecipeError as error:
            where = naming[-1].where(f"{section}.name") if naming else f"{section}.name"
            reading.add(section, f"{where}: {error}")
            continue
        # Before the layers are merged: until then the section's type is Any, and a misspelt key would pass.
        config[section] = _structured(modules[section].Config)
    return modules


def _structured(schema: type) -> DictConfig:
    """Return a new configuration with the defaults of a dataclass; copied, which costs a fifth of building it."""
    return copy.deepcopy(_built(schema))


@functools.cache
def _built(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def _mapping(content: Any) -> dict[str, Any]:
    """Return a section's entries; none where something else stands in its place, which `_Merge` then reports."""
    return content if isinstance(content, dict) else {}


class _Merge:
    """Merge of one layer, value by value, because OmegaConf's own stops at the first thing that is wrong."""

    def __init__(self, config: DictConfig, layer: Layer, reading: Reading) -> None:
        self.config, self.layer, self.reading = config, layer, reading

    def mapping(self, key: str, content: dict[str, Any]) -> None:
        """Assign the entries of a section."""
        node = OmegaConf.select(self.config, key) if key else self.config
        schema = OmegaConf.get_type(node)
        for name, value in content.items():
            below = f"{key}.{name}" if key else str(name)
            if is_dataclass(schema) and name not in field_types(schema):
                self.unknown(below, list(field_types(schema)))
            elif below in self.reading.bad_keys and below in COMPONENTS:
                continue  # the section's file is unknown, and so is what it may hold
            else:
                self.value(below, value)

    def value(self, key: str, value: Any) -> None:
        """Assign one entry: a leaf, a section, or the named entries of data.sources."""
        node = _stored(self.config, key)
        if key == "data.sources" and isinstance(value, dict):
            if key in self.layer.whole:
                self.config.data.sources = {}
            self.mapping(key, value)
        elif key.startswith("data.sources.") and key.count(".") == 2:
            self.source(key, value)
        elif isinstance(node, DictConfig) and isinstance(value, dict):
            self.mapping(key, value)
        elif key in COMPONENTS:  # their type is Any until a file completes it: OmegaConf would take a number
            self.reading.add(key, f"{self.layer.where(key)}: found {value!r}, allowed: a section with its keys")
        else:
            self.leaf(key, value)

    def source(self, key: str, value: Any) -> None:
        """Assign a named source; null takes one of the recipe's away."""
        name = key.rpartition(".")[2]
        if value is None:
            self.config.data.sources.pop(name, None)
            return
        if not isinstance(value, dict):
            self.reading.add(key, f"{self.layer.where(key)}: {value!r} is not a section with at least `shards:`")
            return
        if name not in self.config.data.sources:
            data: Any = OmegaConf.get_type(self.config.data)
            entry = get_args(field_types(data)["sources"])[1]
            self.config.data.sources[name] = _structured(entry)
        self.mapping(key, value)

    def leaf(self, key: str, value: Any) -> None:
        before = _stored(self.config, key)
        # YAML reads `001` as a number and `off` as false, also where text is meant.
        value = _expanded(_as_text(value, self.layer.spelt(key), _annotation(self.config, key)))
        try:
            OmegaConf.update(self.config, key, value)
        except (OmegaConfBaseException, TypeError, ValueError):
            if before is not None and not isinstance(before, DictConfig):
                OmegaConf.update(self.config, key, before)
            allowed = allowed_values(_annotation(self.config, key))
            self.reading.add(key, f"{self.layer.where(key)}: found {value!r}, allowed: {allowed}")

    def unknown(self, key: str, siblings: list[str]) -> None:
        # Not translated: the error names the new key and the line, and a recipe keeps one meaning.
        if key in MOVED:
            self.reading.add(key, f"{self.layer.where(key)}: no such key any more; it is {MOVED[key]} now")
            return
        components = {
            section: type(OmegaConf.to_object(self.config[section]))
            for section in COMPONENTS
            if not OmegaConf.is_missing(self.config, section)
        }
        hint = key_suggestion(key, siblings, list(all_keys(OmegaConf.get_type(self.config) or Recipe, components)))
        self.reading.add(key, f"{self.layer.where(key)}: no such key{hint}")


def _stored(config: DictConfig, key: str) -> Any:
    """Return what stands at a key so far; None where its `${...}` leads nowhere, which a later layer may replace."""
    try:
        return OmegaConf.select(config, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return None


def _as_text(value: Any, spelt: Any, annotation: Any) -> Any:
    """Return a value as it was spelt where its key takes text; null stays null."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(value, list) and origin is list and isinstance(spelt, list) and len(spelt) == len(value):
        return [_as_text(one, text, arguments[0]) for one, text in zip(value, spelt, strict=True)]
    if value is None or not isinstance(spelt, str):
        return value
    if origin in (Union, types.UnionType):
        takes = [_as_text(value, spelt, argument) for argument in arguments if argument is not types.NoneType]
        return takes[0] if len(takes) == 1 else value
    if origin is Literal:
        return spelt if spelt in arguments else value
    return spelt if annotation is str else value


def _expanded(value: Any) -> Any:
    """Expand a leading ~ in paths, wherever they stand: only some of the libraries that take them do."""
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _annotation(config: DictConfig, key: str) -> Any:
    parent, _, name = key.rpartition(".")
    schema = OmegaConf.get_type(OmegaConf.select(config, parent) if parent else config)
    return field_types(schema)[name] if is_dataclass(schema) else dict


def _check_values(config: DictConfig, layers: list[Layer], reading: Reading) -> bool:
    """Report values that are still missing, and `${...}` that lead nowhere; false where there are such."""
    lost = []
    for key, node in _leaves(config):
        # Any other is there, and to resolve all of them takes a quarter of the whole reading.
        if not (node._is_missing() or node._is_interpolation()):
            continue
        # Already reported where it was read; a second line would hide which of the two is the cause.
        if key in reading.bad_keys:
            continue
        # The command line has no lines, and what it gives is not to be looked for in a file.
        layer = next((layer for layer in reversed(layers) if layer.gives(key)), layers[-2 if layers[1:] else 0])
        try:
            OmegaConf.select(config, key, throw_on_missing=True)
        except MissingMandatoryValue:
            lost.append((key, f"{layer.where(key)}: missing, and there is no default"))
        except OmegaConfBaseException as error:
            lost.append((key, f"{layer.where(key)}: {str(error).splitlines()[0]}"))
    for key, problem in lost:
        reading.add(key, problem)
    return not lost


def _leaves(node: DictConfig, prefix: str = "") -> list[tuple[str, Any]]:
    # Nodes, not values: `node[name]` resolves `${...}` and raises at the first that leads nowhere.
    keys = []
    for name in map(str, node):
        below = node._get_node(name)
        if isinstance(below, DictConfig) and not below._is_missing() and not below._is_none():
            keys += _leaves(below, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in COMPONENTS:
            keys.append((f"{prefix}{name}", below))
    return keys


def _to_object(config: DictConfig, modules: dict[str, ModuleType], reading: Reading) -> Recipe | None:
    try:
        recipe = OmegaConf.to_object(config)
        assert isinstance(recipe, Recipe)
        # Presets last: they follow from the size, which any layer may have given.
        recipe.model = modules["model"].ARCHITECTURE.resolve(recipe.model)
    except RecipeError as error:
        for problem in error.problems:
            reading.add("model", problem)
        return None
    except (OmegaConfBaseException, ValueError) as error:
        reading.add("model", str(error).splitlines()[0])
        return None
    return recipe
