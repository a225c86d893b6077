"""Writer of the tables of all keys in docs/recipes.md: python -m pretrain.recipe.manual

The schema is the one place where a key is described; a test fails while the page says something else.
"""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import MISSING

from pretrain.recipe.describe import allowed_values, field_docs, field_types
from pretrain.recipe.files import RECIPES, recipe_names
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe

PAGE = RECIPES.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- keys: written by python -m pretrain.recipe.manual -->", "<!-- end of keys -->"


def key_tables() -> str:
    """Build a Markdown table for every section; of models and objectives, those that the recipes name."""
    recipes = [load_recipe(name) for name in recipe_names()]
    tables = []
    for section, schema in field_types(Recipe).items():
        if dataclasses.is_dataclass(schema):
            tables.append(_table(f"`{section}`", schema, f"{section}."))
            continue
        if section == "program":
            continue  # one value, which the command gives
        used = {getattr(recipe, section).name: type(getattr(recipe, section)) for recipe in recipes}
        tables += [_table(f"`{section}` with `name: {name}`", used[name], f"{section}.") for name in sorted(used)]
    return "\n\n".join(tables)


def update(page: Path = PAGE) -> None:
    """Replace what lies between the page's two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{key_tables()}\n\n{END}{after}", encoding="utf-8")


def _table(title: str, schema: Any, prefix: str) -> str:
    about = (schema.__doc__ or "").strip().partition("\n")[0]
    return "\n".join(
        [
            f"### {title}",
            "",
            about,
            "",
            "| key | default | allowed | meaning |",
            "|---|---|---|---|",
            *_rows(schema, prefix),
        ]
    )


def _rows(schema: Any, prefix: str) -> list[str]:
    rows, docs = [], field_docs(schema)
    for field in dataclasses.fields(schema):
        annotation = field_types(schema)[field.name]
        if get_origin(annotation) is dict:
            rows += _rows(get_args(annotation)[1], f"{prefix}{field.name}.<name>.")
            continue
        if dataclasses.is_dataclass(annotation):
            rows += _rows(annotation, f"{prefix}{field.name}.")
            continue
        cells = [f"`{prefix}{field.name}`", _default(field), allowed_values(annotation), docs.get(field.name, "")]
        # A bare | in a cell would open another column.
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _default(field: "dataclasses.Field[Any]") -> str:
    # A list has to be made anew for each recipe, so its field has a function in place of a default.
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == MISSING:
        return "must be given"
    if isinstance(value, tuple):
        value = list(value)
    words = {None: "null", True: "true", False: "false", "": '""'}
    return f"`{words[value]}`" if isinstance(value, bool | None) or value == "" else f"`{value}`"


if __name__ == "__main__":
    update()
