"""docs/recipes.md says what the schema and the dry run say; docs/extending.md's examples work as they stand there."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import pretrain.models
import pretrain.objectives
from pretrain.commands.pretrain import main
from pretrain.objectives.base import method_of, problems_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe import manual
from pretrain.recipe.components import component_names
from pretrain.recipe.files import RECIPES, recipe_names
from pretrain.recipe.load import load_recipe

DOCS = RECIPES.parent / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)


def test_keys_are_those_of_the_schema(tmp_path: Path) -> None:
    fresh = tmp_path / "recipes.md"
    fresh.write_text((DOCS / "recipes.md").read_text())
    manual.update(fresh)
    assert fresh.read_text() == (DOCS / "recipes.md").read_text(), "run: python -m pretrain.recipe.manual"


def test_table_of_recipes_is_what_the_dry_run_says() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \|", (DOCS / "recipes.md").read_text(), re.M
    )
    assert {row[0] for row in rows} == set(recipe_names()) - {"demo"}
    for name, *stated in rows:
        values = {
            row.strip(): value
            for section in reversed(dry_run(method_of(load_recipe(name))))
            for row, value, _ in reversed(section.rows)
        }
        found = [values["parameters"], values["encoder"], values["forward pass"].removesuffix(" GMAC"), values["steps"]]
        assert found == stated, name


def test_own_recipe_of_the_page_is_sound(tmp_path: Path) -> None:
    (text,) = blocks("recipes.md", "yaml")
    (tmp_path / "ours.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "ours.yaml"))
    assert list(recipe.data.sources) == ["ours"] and recipe.data.epoch_samples is None
    assert problems_of(method_of(recipe)) == []


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The page's files, put where a user would put them; the packages' search paths stand for the folders."""
    for package in (pretrain.models, pretrain.objectives):
        folder = tmp_path / package.__name__.replace(".", "/")
        folder.mkdir(parents=True)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    (tmp_path / "recipes").mkdir()
    files = {}
    for text in blocks("extending.md", "python") + blocks("extending.md", "yaml"):
        header = re.match(r"# ((?:pretrain|recipes)/\S+)\n", text)
        if header:
            files[header[1]] = tmp_path / header[1]
            files[header[1]].write_text(text)
    yield files
    for name in ("pretrain.objectives.motion", "pretrain.models.pooled"):
        sys.modules.pop(name, None)
        package, _, attribute = name.rpartition(".")
        if hasattr(sys.modules[package], attribute):
            delattr(sys.modules[package], attribute)


def batch_of(recipe) -> dict[str, torch.Tensor]:
    """A micro-batch as a data worker makes it: a bright square that moves, and what the method draws for a view."""
    video = torch.zeros(recipe.batch.micro, *recipe.input.size, 3, dtype=torch.uint8)
    for frame in range(recipe.input.frames):
        video[:, frame, 4 * frame : 4 * frame + 16, 8:40] = 200
    return method_of(recipe).example(recipe.batch.micro) | {"video": video}


def test_new_method_and_backbone_are_found_shown_and_learn(
    extended: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "motion" in component_names("pretrain.objectives.{}") and "pooled" in component_names("pretrain.models.{}")
    path = str(extended["recipes/pooled_motion.yaml"])
    recipe = load_recipe(path)
    assert problems_of(method_of(recipe)) == []
    assert main(["--recipe", path, "--print"]) == 0
    assert re.search(r"gain: 4\.0 +# factor on the difference", capsys.readouterr().out)
    assert main(["--recipe", path, "--dry-run"]) == 0
    assert "MMAC" in capsys.readouterr().out

    torch.manual_seed(0)
    objective = method_of(recipe).build()
    optimizer, batch = torch.optim.AdamW(objective.parameters(), 3e-3), batch_of(recipe)
    losses = []
    for _ in range(150):
        output = objective(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


def test_new_method_on_a_published_recipe(extended: dict[str, Path]) -> None:
    recipe = load_recipe(str(extended["recipes/vit_b_motion.yaml"]))
    assert recipe.objective.gain == 4 and recipe.model.dim == 768 and len(recipe.data.sources) == 5
    assert problems_of(method_of(recipe)) == [] and dry_run(method_of(recipe))
    recipe.model.tubelet = 1
    assert any("motion needs cubes of 2 frames" in problem for problem in problems_of(method_of(recipe)))


def test_new_data_set_is_a_block(tmp_path: Path) -> None:
    block = next(text for text in blocks("extending.md", "yaml") if not text.startswith("#"))
    assert set(yaml.safe_load(block)["data"]["sources"]) == {"ours", "k710"}
    path = tmp_path / "ours.yaml"
    path.write_text("base: vit_b_dual\n" + block)
    recipe = load_recipe(str(path))
    assert problems_of(method_of(recipe)) == []
    assert {name: source.weight for name, source in recipe.data.sources.items()} == {"ours": 3, "k710": 1}
