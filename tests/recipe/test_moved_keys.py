"""Keys of an earlier release, and recipes of another command, get one error that names what is right now."""

from dataclasses import asdict
from pathlib import Path

import pytest

from finetune.commands.finetune import main as finetune
from finetune.recipe import PROGRAMS, TuneRecipe
from pretrain.checkpoint.same_run import check_same_run
from pretrain.commands.pretrain import main as pretrain
from pretrain.errors import CheckpointError, RecipeError
from pretrain.recipe.load import MOVED, load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.trained.load_run import load_stored_recipe

MINIMAL = """\
model: {name: videomae, size: small}
objective: {name: videomae}
data:
  sources:
    mine: {shards: /somewhere}
"""
TUNED = MINIMAL.replace("name: videomae, size", "name: classifier, size").replace("videomae", "classification")
OLD = "frames stride height width views crop decoder grid".split()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def problems(path: Path, *overrides: str, schema: type[Recipe] = Recipe) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), list(overrides), schema)
    return caught.value.problems


def test_every_key_of_a_clip_has_moved() -> None:
    assert MOVED == {f"data.{key}": f"input.{key}" for key in OLD}


@pytest.mark.parametrize(("schema", "text"), [(Recipe, MINIMAL), (TuneRecipe, TUNED)])
def test_old_keys_in_a_file_are_told_with_their_line_and_new_name(
    recipe: Path, schema: type[Recipe], text: str
) -> None:
    recipe.write_text(text + "".join(f"  {key}: 8\n" for key in OLD))
    found = problems(recipe, schema=schema)
    assert len(found) == len(OLD), "nothing else is wrong with it"
    for line, (key, problem) in enumerate(zip(OLD, found, strict=True), start=6):
        assert f"mine.yaml:{line}: data.{key}: " in problem and f"it is input.{key} now" in problem


def test_old_keys_on_the_command_line_are_told(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(["--recipe", str(recipe), "--check", "data.frames=8", "data.decoder=decord"]) == 2
    told = capsys.readouterr().err
    assert "command line: data.frames: no such key any more; it is input.frames now" in told
    assert "it is input.decoder now" in told and "Traceback" not in told
    assert pretrain(["--recipe", str(recipe), "--check", "input.frames=8", "input.decoder=pyav"]) == 0


def test_a_base_with_old_keys_is_told_too(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(MINIMAL + "  height: 112\n")
    recipe.write_text("base: below.yaml\ninput: {width: 112}\n")
    (problem,) = problems(recipe)
    assert "below.yaml:6: data.height: " in problem and "it is input.height now" in problem


def test_strides_of_sources_have_not_moved(recipe: Path) -> None:
    assert load_recipe(str(recipe), ["data.sources.mine.stride=2"]).data.sources["mine"].stride == 2


@pytest.mark.parametrize(("text", "other", "command"), [(MINIMAL, "pretrain", finetune), (TUNED, "finetune", pretrain)])
def test_recipe_of_another_command_is_one_error_that_names_it(
    recipe: Path, text: str, other: str, command, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(f"# stored by a run\nprogram: {other}\n{text}")
    assert command(["--recipe", str(recipe), "--check"]) == 2
    told = capsys.readouterr().err
    assert f"mine.yaml:2: program: found '{other}': a recipe of launch/{other}.py, which runs it" in told
    assert told.count("\n") == 1, "its sections, wrong here throughout, are not told as well"
    (problem,) = problems(recipe, "program=preptrain")
    assert problem.startswith(("command line: program: found 'preptrain'", str(recipe))) or "mine.yaml:2" in problem


def test_printed_recipe_says_its_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(["--recipe", str(recipe), "--print"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert pretrain(["--recipe", str(tmp_path / "printed.yaml"), "--check"]) == 0
    assert finetune(["--recipe", str(tmp_path / "printed.yaml"), "--check"]) == 2
    assert "launch/pretrain.py" in capsys.readouterr().err


@pytest.mark.parametrize("programs", [{"pretrain": Recipe}, PROGRAMS])
def test_stored_recipe_without_program_is_refused(recipe: Path, programs: dict[str, type[Recipe]]) -> None:
    with pytest.raises(RecipeError, match=r"mine.yaml: program: found None, allowed here: pretrain.*needs the line"):
        load_stored_recipe(recipe, programs)
    recipe.write_text("program: pretrain\n" + MINIMAL)
    assert load_stored_recipe(recipe, programs).model.dim == 384
    recipe.write_text("program: finetune\n" + TUNED)
    if "finetune" in programs:
        assert isinstance(load_stored_recipe(recipe, programs), TuneRecipe)
    else:
        with pytest.raises(RecipeError, match="found 'finetune', allowed here: pretrain"):
            load_stored_recipe(recipe, programs)


def test_off_is_a_word_where_it_is_allowed(recipe: Path) -> None:
    assert load_recipe(str(recipe), ["input.grid=off"]).input.grid == "off"
    recipe.write_text(MINIMAL + "input: {grid: off}\n")
    assert load_recipe(str(recipe)).input.grid == "off"
    (problem,) = problems(recipe, "input.grid=on")
    assert "input.grid: found True, allowed: one of auto, off" in problem


@pytest.mark.parametrize("section", ["model", "objective", "input"])
def test_section_that_is_no_mapping_is_told(recipe: Path, section: str) -> None:
    assert any(section in problem for problem in problems(recipe, f"{section}=3"))


def test_run_goes_on_when_a_section_has_learnt_a_key(recipe: Path) -> None:
    now = load_recipe(str(recipe))
    for section, key in (("input", "grid"), ("model", "layer_scale"), ("objective", "skip_visible_mask_tokens")):
        before = asdict(now)
        before[section].pop(key)
        assert check_same_run(before, now, "the checkpoint") == []
    other = load_recipe(str(recipe), ["input.grid=off"])
    before = asdict(other)
    before["input"].pop("grid")
    with pytest.raises(CheckpointError, match="input.grid: None -> 'off'"):
        check_same_run(before, other, "the checkpoint")
