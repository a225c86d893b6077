"""Recipes load, and say everything that is wrong with them at once."""

import re
from pathlib import Path

import pytest

from pretrain.errors import RecipeError
from pretrain.models import videomae as model
from pretrain.objectives import videomae as objective
from pretrain.recipe.files import recipe_path
from pretrain.recipe.load import load_recipe

MINIMAL = """\
model: {name: videomae, size: small}
objective: {name: videomae}
data:
  sources:
    mine: {shards: /somewhere}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return caught.value.problems


def test_sections_are_typed_and_presets_filled(write) -> None:
    recipe = load_recipe(write(MINIMAL))
    assert isinstance(recipe.model, model.Config) and isinstance(recipe.objective, objective.Config)
    assert (recipe.model.dim, recipe.model.depth, recipe.model.decoder_dim) == (384, 12, 192)
    assert recipe.optim.betas == (0.9, 0.95)
    assert (recipe.run.name, recipe.run.dir) == ("mine", "runs/mine")


def test_overrides_are_yaml_and_win(write) -> None:
    words = [
        "optim.base_lr=1e-3",
        "optim.betas=[0.9, 0.99]",
        "data.sources.mine.weight=2",
        "run.name=other",
        "optim.clip_grad=null",
    ]
    recipe = load_recipe(write(MINIMAL + "optim: {base_lr: 5e-4, clip_grad: 1}\n"), words)
    assert recipe.optim.base_lr == 0.001 and recipe.optim.betas == (0.9, 0.99) and recipe.optim.clip_grad is None
    assert recipe.data.sources["mine"].weight == 2 and recipe.data.sources["mine"].shards == "/somewhere"
    assert recipe.run.dir == "runs/other"


def test_scientific_notation_without_dot_is_a_number(write) -> None:
    assert load_recipe(write(MINIMAL + "optim: {base_lr: 6e-4}\n")).optim.base_lr == 0.0006


def test_every_problem_is_reported_at_once_with_its_line(write) -> None:
    path = write(
        "model: {name: videomae, sise: giant}\n"
        "objective:\n  name: videomea\n"
        "data:\n  lnaes: 3\n  sources:\n    a: {shards: x, wight: 3}\n    b: {weight: 1}\n"
        "batch:\n  samples: 1e3\n"
        "optim: 3\n"
        "zero: {stage: '${nope.there}'}\n"
    )
    found = problems(path, "compute.dtype=fp8", "run.seed=null", "foo", "quality=1", "batch.base_lr=1")
    text = "\n".join(found)
    for expected in (
        ":1: model.sise: no such key; did you mean 'size'?",
        ":3: objective.name: no objective 'videomea' in pretrain/objectives/; did you mean 'videomae'?",
        ":5: data.lnaes: no such key; did you mean 'lanes'?",
        ":7: data.sources.a.wight: no such key; did you mean 'weight'?",
        ":8: data.sources.b.shards: missing",
        ":10: batch.samples: found 1000.0, allowed: a whole number",
        ":11: optim: found 3, allowed: a section",
        ":12: zero.stage: Interpolation key 'nope.there' not found",
        "command line: compute.dtype: found 'fp8', allowed: one of bf16, fp16, fp32",
        "command line: run.seed: found None, allowed: a whole number",
        "command line: 'foo' is neither an option nor key=value",
        "command line: quality: no such key; there is: program, model, objective, input, data",
        "command line: batch.base_lr: no such key; did you mean 'optim.base_lr'?",
    ):
        assert expected in text
    assert len(found) == 13


@pytest.mark.parametrize("value", ["${", "${data.root", "a ${oc.env:[} b"])
def test_an_incomplete_reference_is_one_problem_with_its_place(write, value: str) -> None:
    (found,) = problems(write(MINIMAL), f"run.name={value}")
    assert "command line: run.name: holds an incomplete ${...}, allowed: ${section.key}" in found
    (found,) = problems(write(MINIMAL + f"run:\n  name: '{value}'\n"))
    assert f":{MINIMAL.count(chr(10)) + 2}: run.name: holds an incomplete ${{...}}" in found


@pytest.mark.parametrize(
    ("text", "expected"), [("~: 4", "Incompatible key type"), (f"batch: {{samples: {'9' * 5000}}}", "4300 digits")]
)
def test_what_is_yaml_but_no_value_is_a_problem_of_the_file(write, text: str, expected: str) -> None:
    (found,) = problems(write(MINIMAL + text))
    assert "mine.yaml" in found and expected in found


def test_a_number_without_end_on_the_command_line_is_a_problem(write) -> None:
    assert "command line: run.seed: Exceeds the limit" in problems(write(MINIMAL), f"run.seed={'9' * 5000}")[0]


@pytest.mark.parametrize(
    ("value", "expected"), [("${foo:bar}", "Unsupported interpolation type foo"), ("${nope}", "key 'nope' not found")]
)
def test_a_name_that_leads_nowhere_is_a_problem_although_the_folder_is_made_of_it(write, value, expected) -> None:
    found = problems(write(MINIMAL), f"run.name={value}", "run.dir=elsewhere")
    assert any("command line: run.name: " in problem and expected in problem for problem in found)


def test_missing_component_lists_what_there_is(write) -> None:
    (found,) = problems(write("model: {name: videomae}\ndata: {sources: {a: {shards: x}}}\n"))
    assert "objective.name: missing" in found and "videomae" in found


@pytest.mark.parametrize(
    ("key", "ours"),
    [("batch.size", "batch.samples"), ("learning_rate", "optim.base_lr"), ("model.num_frames", "input.frames")],
)
def test_what_other_programs_call_so(key: str, ours: str) -> None:
    assert f"{key}: no such key; did you mean {ours!r}?" in "".join(problems("demo", f"{key}=4"))


def test_unknown_recipe_lists_near_names() -> None:
    (found,) = problems("vit_b_daul")
    assert "did you mean vit_b_dual" in found and "vit_g_dual" in found
    assert "no file" in problems("./vit_b_dual.yaml")[0]


@pytest.mark.parametrize(
    ("name", "folder", "expected"),
    [
        ("vit_b_k400", "", "a recipe of launch/finetune.py; its plan: python launch/finetune.py --recipe vit_b_k400"),
        ("vit_b_dual", "finetune", "'vit_b_dual' is a recipe of launch/pretrain.py"),
    ],
)
def test_a_recipe_of_another_command_names_that_command(name: str, folder: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(expected)):
        recipe_path(name, folder=folder)


def test_broken_yaml_names_the_line(write) -> None:
    (found,) = problems(write("model:\n  name: videomae\n  name: twice\n"))
    assert "mine.yaml:3: not valid YAML" in found
    assert "mine.yaml:3: not valid YAML" in problems(write("data:\n  frames: [1\nbatch: 3\n"))[0]
    assert "is a mapping" in problems(write("- a\n- b\n"))[0]


def test_base_is_extended_one_level(write) -> None:
    write(MINIMAL + "batch: {samples: 64}\n", "below.yaml")
    recipe = load_recipe(write("base: below.yaml\nbatch: {micro: 4}\n"))
    assert (recipe.batch.samples, recipe.batch.micro, recipe.run.name) == (64, 4, "mine")
    assert load_recipe(write("base: vit_b_dual\nrun: {seed: 3}\n")).run.seed == 3
    write("base: below.yaml\n", "middle.yaml")
    (found,) = problems(write("base: middle.yaml\n"))
    assert "middle.yaml:1: base" in found and "one level deep" in found


def test_sources_of_a_file_replace_those_of_its_base(write) -> None:
    write(MINIMAL, "below.yaml")
    recipe = load_recipe(write("base: below.yaml\ndata: {sources: {other: {shards: /x}}}\n"))
    assert list(recipe.data.sources) == ["other"]


def test_sources_from_the_command_line(write) -> None:
    path = write(MINIMAL)
    assert list(load_recipe(path, ["data.sources.more.shards=/y"]).data.sources) == ["mine", "more"]
    assert list(load_recipe(path, ["data.sources={more: {shards: /y}}"]).data.sources) == ["more"]
    assert list(load_recipe(path, ["data.sources.more.shards=/y", "data.sources.mine=null"]).data.sources) == ["more"]
    assert "not a section with at least `shards:`" in problems(path, "data.sources.mine=3")[0]


def test_data_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe("vit_b_v1_k400").data.sources["k400"].shards == "shards/k400"
    monkeypatch.setenv("TUBELET_DATA", "s3://bucket/video")
    assert load_recipe("vit_b_v1_k400").data.sources["k400"].shards == "s3://bucket/video/k400"
    assert load_recipe("vit_b_v1_k400", ["data.root=/data"]).data.sources["k400"].shards == "/data/k400"


def test_keys_that_moved_are_named(write) -> None:
    path = write("base: demo\ndata: {frames: 8}\n")
    assert problems(path, "data.decoder=decord") == [
        f"{path}:2: data.frames: no such key any more; it is input.frames now",
        "command line: data.decoder: no such key any more; it is input.decoder now",
    ]


def test_methods_say_which_input_they_take(write) -> None:
    assert load_recipe("demo").input.name == "clip"
    found = problems(write("base: demo\ninput: {name: clop, frames: 8}\n"))
    assert len(found) == 1 and "no input 'clop' in pretrain/samples/; did you mean 'clip'?" in found[0]
