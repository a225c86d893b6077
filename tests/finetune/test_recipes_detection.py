"""The recipes of the plain detector hold what was published, and what can't work is refused."""

import pytest

from finetune.commands.finetune import main
from finetune.recipe import load_tune_recipe
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import recipe_names, recipe_path

#: Size, base rate, layer decay, epochs, GPUs, clips of each, mAP: systems/action_detection.md section 6.
PUBLISHED = {
    "vit_s_ava": ("small", 1e-3, 0.6, 30, 16, 8, "22.5"),
    "vit_b_ava": ("base", 2.5e-4, 0.75, 30, 32, 4, "26.7"),
    "vit_l_ava": ("large", 2.5e-4, 0.75, 30, 32, 4, "34.3"),
    "vit_h_ava": ("huge", 5e-4, 0.8, 20, 64, 2, "36.5"),
    "vit_l_ava_k700": ("large", 2.5e-4, 0.75, 30, 32, 4, "36.1"),
    "vit_s_ava_labels": ("small", 5e-4, 0.6, 30, 16, 8, "28.4"),
    "vit_b_ava_labels": ("base", 5e-4, 0.75, 30, 32, 4, "31.8"),
    "vit_l_ava_labels": ("large", 5e-4, 0.8, 20, 32, 4, "37.0"),
    "vit_h_ava_labels": ("huge", 5e-4, 0.8, 20, 64, 2, "39.5"),
    "vit_l_ava_k700_labels": ("large", 5e-4, 0.8, 20, 32, 4, "39.3"),
}


def test_there_is_a_recipe_for_every_row() -> None:
    detectors = {name for name in recipe_names("finetune") if load_tune_recipe(name).objective.name == "detection"}
    assert detectors == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    size, rate, decay, epochs, gpus, clips, precision = PUBLISHED[name]
    recipe = load_tune_recipe(name)
    method = method_of(recipe)
    assert problems_of(method) == []
    assert [line for line in warnings_of(method) if "no multiple of" not in line] == [
        "run.init_weights is null: the network starts from random weights; give pre-trained ones"
    ]
    assert (recipe.model.size, recipe.optim.base_lr, recipe.optim.layer_decay) == (size, rate, decay)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs) == (epochs, 5)
    assert (recipe.batch.ranks, recipe.batch.micro, recipe.batch.samples) == (gpus, clips, 128)
    assert recipe.model.drop_path == 0.2 and recipe.optim.betas == (0.9, 0.999) and recipe.optim.weight_decay == 0.05
    assert recipe.optim.base_min_lr == 1e-6 and recipe.optim.base_warmup_lr == 0 and recipe.ema.decay is None
    given = recipe.input
    assert (given.frames, given.stride, given.video_fps, given.short_side, given.crop_size) == (16, 4, 25, 256, 224)
    assert (given.keyframe, given.convention, given.crop, given.colour) == ("alphaction", "alphaction", "random", "hsv")
    assert given.jitter and given.pad == 16 and given.max_boxes == 100 and given.min_score == 0.8
    assert f"{precision} mAP" in recipe_path(name, folder="finetune").read_text()


def test_the_plan_of_a_detector() -> None:
    values = {row.strip(): value for section in dry_run(method_of(load_tune_recipe("vit_b_ava")))
              for row, value, _ in section.rows}  # fmt: skip
    assert values["parameters"] == "86,288,720" and values["peak"] == "0.000125" and values["end"] == "5e-07"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.pooling=mean"], "model.pooling: this one has an fc_norm"),
        (["model.positions=rebuild"], "allowed with clips that vary in size: interpolate"),
        (["objective.loss=focal", "model.classes=24"], "objective.loss=focal: model.classes=24"),
        (["input.crop_size=300"], "input.crop_size: found 300"),
        (["input.pad=24"], "input.pad: found 24, allowed: multiples of the model's patches"),
        (["evaluate.clips=3"], "evaluate.clips: has no effect with objective.name=detection"),
        (["data.sources.ava.sampling=sparse"], "data.sources.ava.sampling: has no effect"),
        (["augment.mixup=0.1"], "augment: objective.name=detection does not read this section"),
        (["evaluate.test=best", "data.sources.ava.val=null"], "needs a validation"),
        (["model.tokens.keep_rate=1.5"], "model.tokens"),
        (["objective.extension=[-1, 0]"], "objective.extension"),
        (["input.views=2"], "input.views: found 2, allowed: 1"),
    ],
)
def test_what_can_not_work_is_refused(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "vit_b_ava", "--check", *words]) == 2
    assert expected in capsys.readouterr().err
