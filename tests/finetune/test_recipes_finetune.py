"""Every file of recipes/finetune/ loads, is sound, can be planned, and says what was published."""

import pytest

from finetune.commands.finetune import main
from finetune.recipe import load_tune_recipe
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import recipe_names

#: Parameters, actual learning rate, epochs, layer decay, drop path, head dropout, views of the test, videos a step:
#: systems/videomae.md, sections 2 and 8.
PUBLISHED = {
    "vit_s_v1_k400": (22_033_936, 7.5e-4, 150, 0.75, 0.1, 0, 15, 384),
    "vit_b_v1_k400_800e": (86_534_800, 2e-3, 100, 0.75, 0.1, 0, 15, 512),
    "vit_b_v1_k400": (86_534_800, 7.5e-4, 75, 0.75, 0.1, 0, 15, 384),
    "vit_l_v1_k400": (304_270_736, 1e-3, 35, 0.75, 0.1, 0, 15, 128),
    "vit_h_v1_k400": (632_119_440, 2e-3, 50, 0.75, 0.2, 0.5, 15, 512),
    "vit_s_v1_ssv2": (None, 1.5e-3, 40, 0.7, 0.1, 0, 6, 384),
    "vit_b_v1_ssv2_800e": (None, 1e-3, 50, 0.75, 0.1, 0, 6, 512),
    "vit_b_v1_ssv2": (None, 7.5e-4, 30, 0.75, 0.1, 0, 6, 384),
    "vit_b_v1_ucf101": (None, 2.5e-4, 100, 0.7, 0.2, 0.5, 15, 128),
    "vit_b_v1_hmdb51": (None, 2.5e-4, 50, 0.7, 0.2, 0.5, 15, 128),
    "vit_b_k400": (86_534_800, 1.4e-3, 90, 0.75, 0.1, 0, 15, 512),
    "vit_b_k710": (86_773_190, 1.4e-3, 90, 0.75, 0.1, 0, 15, 512),
    "vit_b_ssv2": (None, 2e-3, 25, 0.65, 0.1, 0, 6, 256),
    "vit_l_k400": (304_270_736, 1.5e-3, 35, 0.75, 0.2, 0, 15, 192),
    "vit_l_ssv2": (None, 3.75e-4, 20, 0.75, 0.2, 0, 6, 192),
    "vit_h_k400": (632_119_440, 5e-4, 40, 0.8, 0.2, 0.5, 15, 128),
    "vit_h_k600": (None, 5e-4, 40, 0.8, 0.2, 0.5, 15, 128),
    "vit_h_k710": (632_516_550, 5e-4, 40, 0.8, 0.2, 0.5, 15, 128),
    "vit_h_ssv2": (None, 2.5e-4, 20, 0.8, 0.2, 0, 6, 128),
    "vit_g_k710": (1_012_611_142, 3.75e-4, 35, 0.9, 0.3, 0, 15, 96),
    "vit_g_k400_direct": (1_012_174_352, 7.5e-4, 30, 0.9, 0.2, 0, 15, 192),
    "vit_g_k400": (1_012_174_352, 3.75e-6, 3, 0.9, 0.25, 0, 15, 96),
    "vit_g_k600": (None, 3.75e-6, 3, 0.9, 0.25, 0, 15, 96),
    "vit_g_ssv2": (None, 1.125e-4, 20, 0.9, 0.25, 0, 6, 96),
    "vit_g_ucf101": (None, 9.375e-5, 50, 0.9, 0.35, 0.5, 15, 24),
    # Published of these: sizes, data, views; the rest is vit_b_k710's with 100 epochs.
    "vit_s_distill_k710": (22_153_286, 1.4e-3, 100, 0.75, 0.1, 0, 15, 512),
    "vit_b_distill_k710": (86_773_190, 1.4e-3, 100, 0.75, 0.1, 0, 15, 512),
    "vit_g_hmdb51": (None, 4.6875e-5, 15, 0.9, 0.35, 0.5, 15, 24),
}
#: Recipe with fewer tokens: the one that it is based on, cost of a view (systems/evit.md section 6, and the embedding).
DROPPING = {
    "vit_s_evit_k400": ("vit_s_v1_k400", "34.8 GMAC"),
    "vit_b_evit_k400": ("vit_b_k400", "113.1 GMAC"),
    "vit_b_evit_ssv2": ("vit_b_ssv2", "113.1 GMAC"),
}
#: Recipe that chooses frames by motion: the one that it is based on.
BY_MOTION = {
    "vit_b_mgsampler_ssv2": "vit_b_ssv2",
    "tdn_r50_8f_mgsampler_ssv2": "tdn_r50_8f_ssv2",
    "tsm_r50_16f_mgsampler_ssv1": "tsm_r50_16f_ssv1",
    "tsm_r50_16f_mgsampler_ssv2": "tsm_r50_16f_ssv2",
}
FROM_SCRATCH = "run.init_weights is null"


def test_there_is_a_recipe_for_every_row() -> None:
    recipes = {name: load_tune_recipe(name) for name in recipe_names("finetune")}
    tasks = ("classification", "distillation")
    tuned = {name: one for name, one in recipes.items() if one.optim.name == "adamw" and one.objective.name in tasks}
    videomae = {name for name, one in tuned.items() if one.model.name == "classifier"}
    assert videomae == {*PUBLISHED, *DROPPING, "vit_b_mgsampler_ssv2", "demo_finetune"}


@pytest.mark.parametrize("name", DROPPING)
def test_recipes_that_drop_tokens_are_their_base_otherwise(name: str) -> None:
    base, gmacs = DROPPING[name]
    recipe, plain = load_tune_recipe(name), load_tune_recipe(base)
    assert problems_of(method_of(recipe)) == []
    values = {row: value for section in dry_run(method_of(recipe)) for row, value, _ in section.rows}
    assert values["forward pass"] == gmacs
    tokens, epochs = recipe.model.tokens, recipe.schedule.epochs
    assert tokens.keep_rate == 0.7 and tokens.start_epoch == pytest.approx(epochs / 30, rel=0.01)
    assert tokens.shrink_epochs == pytest.approx(epochs / 3, rel=0.01)
    recipe.model.tokens, recipe.run = plain.model.tokens, plain.run
    assert recipe == plain


@pytest.mark.parametrize("name", BY_MOTION)
def test_recipes_that_choose_frames_by_motion_are_their_base_otherwise(name: str) -> None:
    recipe, plain = load_tune_recipe(name), load_tune_recipe(BY_MOTION[name])
    assert problems_of(method_of(recipe)) == []
    warnings = [line for line in warnings_of(method_of(recipe)) if "no multiple of" not in line]
    assert len(warnings) == 1 and FROM_SCRATCH in warnings[0]
    assert {source.sampling for source in recipe.data.sources.values()} == {"motion"}
    for source in recipe.data.sources.values():
        source.sampling = "sparse"
    recipe.input.motion, recipe.run = plain.input.motion, plain.run
    assert recipe == plain


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    parameters, rate, epochs, decay, drop_path, head_dropout, views, samples = PUBLISHED[name]
    recipe = load_tune_recipe(name)
    assert problems_of(method_of(recipe)) == []
    warnings = [line for line in warnings_of(method_of(recipe)) if "no multiple of" not in line]
    assert len(warnings) == 1 and FROM_SCRATCH in warnings[0]
    values = {
        row.strip(): value
        for section in reversed(dry_run(method_of(recipe)))
        for row, value, _ in reversed(section.rows)
    }
    assert parameters is None or int(values["parameters"].replace(",", "")) == parameters
    assert float(values["peak"]) == pytest.approx(rate, rel=1e-3)
    assert values["accumulation"] == "1"
    assert (recipe.schedule.epochs, recipe.optim.layer_decay, recipe.batch.samples) == (epochs, decay, samples)
    assert (recipe.model.drop_path, recipe.model.head_dropout) == (drop_path, head_dropout)
    assert recipe.evaluate.clips * recipe.evaluate.crops == views
    assert recipe.optim.betas == (0.9, 0.999) and recipe.objective.smoothing == 0.1


def test_data_sets_own_their_sampling() -> None:
    for name in PUBLISHED:
        for key, source in load_tune_recipe(name).data.sources.items():
            sparse = key == "ssv2"
            assert (source.sampling, source.flip) == (("sparse", False) if sparse else ("dense", True)), name
            assert source.stride == (2 if key == "hmdb51" else None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.sources.ssv2.sampling=dense"], "published with sparse"),
        (["data.sources.ssv2.flip=true"], "tell left from right"),
        (["data.sources.ssv2.stride=4"], "has no effect"),
    ],
)
def test_mismatch_is_warned_of(words: list[str], expected: str) -> None:
    assert any(expected in line for line in warnings_of(method_of(load_tune_recipe("vit_b_ssv2", words))))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["batch.micro=1", "batch.samples=2", "input.views=1", "augment.mixup=1"], "is odd"),
        (["augment.randaugment=strong"], "not timm's notation"),
        (["objective.task=regression", "augment.cutmix=1"], "can't be mixed"),
        (["ema.decay=1.5", "zero.stage=3"], "ema.decay"),
        (["evaluate.test=best", "data.sources.actions.val=null"], "needs a validation"),
        (["optim.layer_decai=1"], "did you mean 'layer_decay'"),
        (["objective.name=clasification"], "in finetune/"),
        (["augment.area=[0.9, 0.1]"], "augment.area"),
        (["tune.lora.rank=0"], "tune.lora.rank"),
        (["health.shards=somewhere"], "for pre-training only"),
        (["model.classes=1"], "one class among one has nothing to learn"),
    ],
)
def test_what_can_not_work_is_refused(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "demo_finetune", "--check", *words]) == 2
    assert expected in capsys.readouterr().err


def test_printed_recipe_is_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    assert main(["--recipe", "demo_finetune", "--print", "optim.layer_decay=0.5"]) == 0
    path = f"{tmp_path}/printed.yaml"
    text = capsys.readouterr().out
    with open(path, "w") as file:
        file.write(text)
    again = load_tune_recipe(path, ["run.name=demo_finetune"])
    assert again == load_tune_recipe("demo_finetune", ["optim.layer_decay=0.5"])
    assert "officially num_sample" in text, "every key carries its meaning"


def memory_of(name: str, *words: str) -> dict[str, str]:
    """The dry run's table of a rank's memory."""
    for section in dry_run(method_of(load_tune_recipe(name, list(words)))):
        if section.title.startswith("memory"):
            return {row: value for row, value, _ in section.rows}
    raise AssertionError("no such table")


def test_memory_of_a_frozen_giant_with_adapters() -> None:
    trained = 7_267_840 + 2 * 1408 + 710 * 1409  # bottlenecks, fc_norm, head
    found = memory_of("vit_g_k710", "tune.method=adaptformer", "batch.ranks=1", "batch.samples=3", "zero.stage=1")
    assert found["frozen weights"] == f"{(1_012_611_142 - 2 * 1408 - 710 * 1409) * 2 / 1e9:.2f} GB", "bf16, and no more"
    assert found["optimiser"] == f"{trained * 12 / 1e6:.1f} MB" and found["gradients"] == f"{trained * 4 / 1e6:.1f} MB"
    sharded = memory_of("vit_g_k710", "tune.method=adaptformer", "zero.stage=3", "optim.name=sgd")
    assert sharded["frozen weights"] == f"{(1_012_611_142 - 2 * 1408 - 710 * 1409) * 2 / 32 / 1e6:.1f} MB"
    assert sharded["optimiser"] == f"{trained * 8 / 32 / 1e6:.1f} MB", "SGD has one moment"


def test_memory_of_the_teacher_counts() -> None:
    found = memory_of("vit_s_distill_k710")
    assert found["teacher"] == f"{1_012_611_142 * 2 / 1e9:.2f} GB"
    assert float(found["together"].removesuffix(" GB")) > 2.03
    filling_a_cache = memory_of("vit_s_distill_k710", "objective.cache=logits")
    assert filling_a_cache["teacher"] == found["teacher"]
