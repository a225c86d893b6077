"""docs/recipes.md says what the schema and the dry run say; docs/extending.md's examples work as they stand there."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import finetune
import pretrain.models
import pretrain.objectives
import pretrain.samples
from finetune.commands.finetune import main as finetune_main
from finetune.recipe import TuneRecipe
from pretrain.commands.pretrain import main
from pretrain.errors import RecipeError
from pretrain.models.base import Classifier, architecture_of
from pretrain.objectives.base import method_of, problems_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe import manual
from pretrain.recipe.components import component_names
from pretrain.recipe.files import RECIPES, recipe_names
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.samples.masks import draw

DOCS = RECIPES.parent / "docs"
#: What masks are drawn for.
MASKS = ("encoder_mask", "decoder_mask")


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
    # Other methods have a table in their own guides.
    elsewhere = {name for name in recipe_names() if load_recipe(name).objective.name != "videomae"}
    assert {row[0] for row in rows} == set(recipe_names()) - {"demo"} - elsewhere
    for name, *stated in rows:
        values = {
            row.strip(): value
            for section in reversed(dry_run(method_of(load_recipe(name))))
            for row, value, _ in reversed(section.rows)
        }
        found = [values["parameters"], values["encoder"], values["forward pass"].removesuffix(" GMAC"), values["steps"]]
        assert found == stated, name


@pytest.mark.parametrize("name", ["formats", "huggingface", "clip_weights", "vit"])
def test_files_beside_components_are_none(name: str) -> None:
    assert not {name, "base"} & set(component_names("pretrain.models.{}"))
    with pytest.raises(RecipeError, match=f"no model '{name}' in pretrain/models/"):
        load_recipe("vit_b_dual", [f"model.name={name}"])


def test_own_recipe_of_the_page_is_sound(tmp_path: Path) -> None:
    (text,) = blocks("recipes.md", "yaml")
    (tmp_path / "ours.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "ours.yaml"))
    assert list(recipe.data.sources) == ["ours"] and recipe.data.epoch_samples is None
    assert problems_of(method_of(recipe)) == []


ADDED = re.compile(r"# ((?:pretrain|finetune|recipes)/\S+)\n")


@pytest.fixture
def extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """The page's files, put where a user would put them; the packages' search paths stand for the folders."""
    for package in (pretrain.models, pretrain.objectives, pretrain.samples, finetune):
        folder = tmp_path / package.__name__.replace(".", "/")
        folder.mkdir(parents=True)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    files = {}
    for text in blocks("extending.md", "python") + blocks("extending.md", "yaml"):
        header = ADDED.match(text)
        if header:
            files[header[1]] = tmp_path / header[1]
            files[header[1]].parent.mkdir(parents=True, exist_ok=True)
            files[header[1]].write_text(text)
    yield files
    for path in files:
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if path.endswith(".py") and sys.modules.pop(name, None):
            package, _, attribute = name.rpartition(".")
            if attribute in vars(sys.modules.get(package, finetune)):
                delattr(sys.modules[package], attribute)


def moving_square(recipe: Recipe) -> dict[str, Any]:
    """A micro-batch as a data worker makes it: a bright square that moves, and the masks of each view."""
    method, shape = method_of(recipe), recipe.input
    plan = method.mask_plan()  # type: ignore[attr-defined]
    rngs = [[np.random.default_rng([i, len(purpose)]) for purpose in MASKS] for i in range(recipe.batch.micro)]
    drawn = [draw(plan, *pair) for pair in rngs]
    video = torch.zeros(recipe.batch.micro, shape.frames, shape.height, shape.width, 3, dtype=torch.uint8)
    for frame in range(shape.frames):
        video[:, frame, 4 * frame : 4 * frame + 16, 8:40] = 200
    made = {"video": video} | {key: torch.from_numpy(np.stack([view[key] for view in drawn])) for key in drawn[0]}
    assert {key: value.shape for key, value in made.items()} == {
        key: value.shape for key, value in method.example(recipe.batch.micro).items() if key in made
    }
    return made


def losses_on(recipe: Recipe, batch: dict[str, Any], steps: int, rate: float = 3e-3) -> list[float]:
    """Losses while the recipe's objective learns one batch."""
    torch.manual_seed(0)
    objective = method_of(recipe).build()
    optimizer = torch.optim.AdamW(objective.parameters(), rate)
    losses = []
    for _ in range(steps):
        loss = objective(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


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
    (problem,) = problems_of(method_of(load_recipe(path, ["health.shards=anywhere"])))
    assert "health.shards" in problem and "model.name=pooled" in problem and "encodes" in problem
    losses = losses_on(recipe, moving_square(recipe), steps=150)
    assert losses[-1] < 0.6 * losses[0]


def test_new_method_on_a_published_recipe(extended: dict[str, Path]) -> None:
    recipe = load_recipe(str(extended["recipes/vit_b_motion.yaml"]))
    assert recipe.objective.gain == 4 and recipe.model.dim == 768 and len(recipe.data.sources) == 5
    assert problems_of(method_of(recipe)) == [] and dry_run(method_of(recipe))
    recipe.model.tubelet = 1
    assert any("motion needs cubes of 2 frames" in problem for problem in problems_of(method_of(recipe)))


def test_new_kind_of_sample_is_the_input_of_its_method(
    extended: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "frame_pair" in component_names("pretrain.samples.{}")
    path = str(extended["recipes/image_vit_order.yaml"])
    recipe = load_recipe(path)
    assert (recipe.input.name, recipe.input.gap) == ("frame_pair", 4), "METHOD.INPUT, without a name in the recipe"
    assert main(["--recipe", path, "--print"]) == 0
    assert re.search(r"gap: 4 +# frames of the video from the earlier", capsys.readouterr().out)
    assert main(["--recipe", path, "--dry-run"]) == 0
    assert re.search(r"pixels +2 x 64 x 64 +4 frames of the video apart", capsys.readouterr().out)
    for word, expected in (("input.gap=0", "input.gap: found 0"), ("input.gapp=1", "did you mean 'gap'"),
                           ("input.name=clip", "takes frame_pair"), ("model.classes=2", "allowed: 1")):  # fmt: skip
        assert main(["--recipe", path, "--check", *(["input.gap=2"] if "=clip" in word else []), word]) == 2
        assert expected in capsys.readouterr().err
    batch = method_of(recipe).example(recipe.batch.micro)
    assert batch["pair"].shape == (4, 2, 64, 64, 3) and 0 < batch["turned"].sum() < 4
    losses = losses_on(recipe, batch, steps=30, rate=1e-3)
    assert losses[-1] < 0.5 * losses[0]


def test_new_classifier_starts_from_its_encoder_and_learns_the_new_task(
    extended: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "focal" in component_names("finetune.{}.task") and "motion" not in component_names("finetune.{}.task")
    path = str(extended["recipes/finetune/pooled_focal.yaml"])
    assert finetune_main(["--recipe", path, "--dry-run"]) == 0
    assert finetune_main(["--recipe", path, "--print"]) == 0
    assert re.search(r"gamma: 2\.0 +# exponent of a clip's weight", capsys.readouterr().out)
    recipe = load_recipe(path, [], TuneRecipe)
    assert problems_of(method_of(recipe)) == []
    architecture = architecture_of(recipe, Classifier)
    assert [architecture.layer_of(name) for name in ("embed.bias", "head.weight")] == [(0, 2), (2, 2)]
    encoder = method_of(load_recipe(str(extended["recipes/pooled_motion.yaml"]))).build().model
    objective = method_of(recipe).build()
    objective.load_pretrained("pooled", encoder.state_dict())
    assert torch.equal(objective.model.mix.weight, encoder.encoder.mix.weight)
    batch = method_of(recipe).example(recipe.batch.micro)
    features = objective.features(batch)
    assert features.shape == (4, 64)
    plain = load_recipe(path, ["augment.mixup=0", "augment.cutmix=0", "objective.smoothing=0"], TuneRecipe)
    losses = losses_on(plain, batch | {"target": torch.tensor([0, 0, 1, 1])}, steps=30)
    assert losses[-1] < losses[0]


def test_new_data_set_is_a_block(tmp_path: Path) -> None:
    block = next(text for text in blocks("extending.md", "yaml") if not text.startswith("#"))
    assert set(yaml.safe_load(block)["data"]["sources"]) == {"ours", "k710"}
    path = tmp_path / "ours.yaml"
    path.write_text("base: vit_b_dual\n" + block)
    recipe = load_recipe(str(path))
    assert problems_of(method_of(recipe)) == []
    assert {name: source.weight for name, source in recipe.data.sources.items()} == {"ours": 3, "k710": 1}
