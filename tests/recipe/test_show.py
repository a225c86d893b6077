"""--print: every key with its meaning, and a text that is itself a recipe."""

import dataclasses
from pathlib import Path

import pytest

from pretrain.recipe.components import component_names, load_component
from pretrain.recipe.describe import all_keys, field_docs, field_types
from pretrain.recipe.files import recipe_names
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe, Source
from pretrain.recipe.show import show_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_printed_recipe_loads_as_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["run.time_limit_minutes=30", "run.init_weights='a: b # c'"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(show_recipe(recipe))
    assert load_recipe(str(printed)) == recipe


def test_every_key_is_printed_with_its_meaning() -> None:
    recipe = load_recipe("demo")
    components = {"model": type(recipe.model), "objective": type(recipe.objective), "input": type(recipe.input)}
    lines = show_recipe(recipe).splitlines()
    for key in all_keys(Recipe, components):
        last = key.rpartition(".")[2]
        assert any(line.strip().startswith(f"{last}: ") and "  # " in line for line in lines), key


def test_every_field_of_the_schema_is_documented() -> None:
    sections = [section for section in field_types(Recipe).values() if dataclasses.is_dataclass(section)]
    components = [
        load_component("", name, pattern).Config
        for pattern in ("pretrain.models.{}", "pretrain.objectives.{}")
        for name in component_names(pattern)
    ]
    assert components
    for section in [*sections, Source, *components]:
        assert set(field_docs(section)) == set(field_types(section)), section
        assert section.__doc__ and not section.__doc__.startswith(f"{section.__name__}("), section
