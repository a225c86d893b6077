"""Recipes of strangers read nothing and write nowhere that their reader did not mean; text stays as it was spelt."""

from pathlib import Path

import pytest

from pretrain.errors import RecipeError
from pretrain.recipe.check import check_recipe
from pretrain.recipe.load import load_recipe
from pretrain.recipe.show import show_recipe

MINIMAL = """\
model: {name: videomae, size: small}
objective: {name: videomae}
data: {sources: {mine: {shards: "%s"}}}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET_KEY}",
        "${oc.env:SECRET_KEY,none}",
        "${oc.env:${data.root}}",
        "${oc.create:{a: '${oc.env:SECRET_KEY}'}}",
        "${oc.decode:'${oc.env:SECRET_KEY}'}",
    ],
)
def test_a_secret_of_the_environment_is_not_read(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    path = write(tmp_path, MINIMAL % value)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["data.root=SECRET_KEY"])
    assert "hunter2" not in str(caught.value) and "SECRET_KEY" in str(caught.value)


def test_the_short_list_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUBELET_DATA", "/data")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("WORK", raising=False)
    recipe = load_recipe(
        write(tmp_path, MINIMAL % "${oc.env:SCRATCH}/${oc.env:WORK,w}"), ["data.root=${oc.env:TUBELET_DATA}"]
    )
    assert (recipe.data.sources["mine"].shards, recipe.data.root) == ("/scratch/w", "/data")
    with pytest.raises(RecipeError, match="mine.yaml:3: data.sources.mine.shards: .*no WORK"):
        load_recipe(write(tmp_path, MINIMAL % "${oc.env:WORK}"))


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", "a\\\\b", " x", "x\ny", "n" * 201])
def test_the_name_of_a_run_is_a_name(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL % "/s"))
    recipe.run.name = name
    assert any("run.name" in line for line in check_recipe(recipe)), name
    recipe.run.name = "Größe 2.b_1"
    assert not any("run.name" in line for line in check_recipe(recipe))


@pytest.mark.parametrize("name", ["001", "on", "off", "1e3", "2024-01-02", "0x1f", "1_000", "3.10", "~x"])
def test_text_stays_text(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL % "/s")
    from_words = load_recipe(path, [f"run.name={name}"])
    in_file = load_recipe(write(tmp_path, MINIMAL % "/s" + f"run: {{name: {name}}}\n"))
    assert from_words.run.name == in_file.run.name == name
    assert from_words.run.dir == f"runs/{name}"
    stored = tmp_path / "stored.yaml"
    stored.write_text(show_recipe(in_file))
    assert load_recipe(str(stored)) == in_file


def test_null_and_numbers_stay_what_they_are(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, MINIMAL % "/s"), ["checkpoint.upload=null", "batch.samples=016", "data.compose=mixed"]
    )
    assert (recipe.checkpoint.upload, recipe.batch.samples, recipe.data.compose) == (None, 14, "mixed")


def test_paths_expand_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path, MINIMAL % "~/shards" + "checkpoint: {upload: ~/up}\n")
    recipe = load_recipe(path, ["run.dir=~/x", "data.root=~/y", "data.cache_dir=~/c"])
    assert (recipe.run.dir, recipe.data.root, recipe.data.cache_dir) == ("/home/me/x", "/home/me/y", "/home/me/c")
    assert (recipe.data.sources["mine"].shards, recipe.checkpoint.upload) == ("/home/me/shards", "/home/me/up")


def test_deep_nesting_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mine.yaml: can't be read: nested too deep"):
        load_recipe(write(tmp_path, "a: " + "[" * 3000 + "]" * 3000))
    with pytest.raises(RecipeError, match="mine.yaml: 1048581 bytes, at most 1048576"):
        load_recipe(write(tmp_path, "a: " + "x" * (1 << 20) + "y\n"))


@pytest.mark.parametrize(
    "upload", ["DIR", "DIR/", "file://DIR", "DIR/..", "DIR/checkpoints", "DIR/up", "LINK", "LINK/up"]
)
def test_uploads_go_nowhere_near_the_run_folder(upload: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    recipe = load_recipe(write(tmp_path, MINIMAL % "/s"), [f"run.dir={run}"])
    recipe.checkpoint.upload = upload.replace("DIR", str(run)).replace("LINK", str(tmp_path / "link"))
    assert [line for line in check_recipe(recipe) if "checkpoint.upload" in line], recipe.checkpoint.upload
    for apart in (f"{run}_up", f"{tmp_path}/up/one", "s3://bucket/one"):
        recipe.checkpoint.upload = apart
        assert not [line for line in check_recipe(recipe) if "checkpoint.upload" in line], apart
