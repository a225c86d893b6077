"""Every file of recipes/ loads, has nothing wrong with it, and can be planned; published numbers are as published."""

import re

import pytest
import torch

from pretrain.engine.build import count_model
from pretrain.objectives.base import method_of, problems_of, warnings_of
from pretrain.plan.dry_run import dry_run
from pretrain.recipe.files import RECIPES, recipe_names
from pretrain.recipe.load import load_recipe

#: Model and encoder parameters, GMAC of a clip, actual learning rate, effective epochs: systems/videomae.md, 2 and 7.
PUBLISHED = {
    "vit_s_dual": ("24,029,376", "21,879,936", "7.8", 4e-3, 800),
    "vit_b_dual": ("94,210,944", "86,227,200", "25.8", 4e-3, 800),
    "vit_l_dual": ("317,782,016", "303,860,736", "68.3", 6e-3, 1200),
    "vit_h_dual": ("645,659,392", "631,607,040", "122.1", 8e-3, 1200),
    "vit_g_dual": ("1,026,306,560", "1,011,610,752", "241.6", 4.8e-3, 1200),
    "vit_s_v1_k400": ("24,029,376", "21,879,936", "11.5", 6e-4, 1600),
    "vit_b_v1_k400": ("94,210,944", "86,227,200", "35.4", 1.2e-3, 1600),
    "vit_l_v1_k400": ("342,996,992", "303,860,736", None, 3e-4, 1600),
    "vit_h_v1_k400": ("692,487,296", "631,607,040", None, 6e-4, 1600),
    "vit_s_v1_ssv2": ("24,029,376", "21,879,936", "11.5", 1.2e-3, 2400),
    "vit_b_v1_ssv2": ("94,210,944", "86,227,200", "35.4", 1.2e-3, 2400),
    "vit_b_v1_ucf101": ("94,210,944", "86,227,200", None, 2.25e-4, 3200),
    "vit_b_v1_hmdb51": ("94,210,944", "86,227,200", None, 2.25e-4, 4800),
}

#: Model parameters, new ones in millions, GMAC of a picture: systems/sparseformer_bootstrap.md, section 3.
BOOTSTRAPPED = {
    "sparseformer_btsp_augreg_base": (64_185_448, 6.71, 3.78),
    "sparseformer_btsp_augreg_large": (212_426_984, 9.86, 11.34),
    "sparseformer_btsp_openai_clip_base": (63_809_664, 6.71, 3.78),
    "sparseformer_btsp_openai_clip_large": (212_188_476, 9.86, 14.82),
}
#: Model parameters, those that are trained, GMAC of a narrated clip, samples of a step, patches kept of a frame.
TVTSV2 = {
    "vit_b32_tvtsv2": (185_962_244, 157_590_788, 85.4, 1920, 49),
    "vit_b16_tvtsv2": (184_305_668, 155_934_212, 159.8, 960, 98),
    "vit_h14_tvtsv2": (1_221_286_404, 994_554_372, 896.9, 160, 76),
}
#: Encoder parameters, its GMAC of a view, actual learning rate, epochs, rows that are compared: systems/snclr.md, 4.
CONTRASTIVE = {
    "vit_s_snclr": (21_665_664, 4.6, 2.4e-3, 300, 4096),
    "vit_s_snclr_k400": (21_879_936, 56.9, 6e-4, 200, 1024),
    "r50_snclr": (23_508_032, 4.1, 9.6, 300, 4096),
}
#: Parameters of TagAlign's projector with its two scales: four convolutions of 768 channels or one block, last norm and
#: projection (systems/tagalign.md, section 2.2).
PROJECTORS = {
    "clip_vit_b16_tagalign": 4 * (9 * 768**2 + 3 * 768 + 1) + 2 * 768 + 768 * 512 + 2,
    "clip_vit_b16_tagalign_transformer": 7_087_872 + 2 * 768 + 768 * 512 + 2,
}
#: Parameters of an inherited block of so many channels.
BLOCK = {768: 7_087_872, 1024: 12_596_224}


def report(name: str) -> dict[str, str]:
    """Values of the dry run by the row's name; the first section that has a name gives its value."""
    rows = [(row.strip(), value) for section in dry_run(method_of(load_recipe(name))) for row, value, _ in section.rows]
    return dict(reversed(rows))


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_is_sound(name: str) -> None:
    recipe = load_recipe(name)
    assert problems_of(method_of(recipe)) == []
    assert warnings_of(method_of(recipe)) == []
    assert report(name)["accumulation"] == "1"
    header = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0]
    assert header.startswith("# "), "a recipe starts with what it is and where its numbers come from"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    parameters, encoder, gmac, rate, epochs = PUBLISHED[name]
    recipe, values = load_recipe(name), report(name)
    assert (values["parameters"], values["encoder"]) == (parameters, encoder)
    assert gmac is None or values["forward pass"] == f"{gmac} GMAC"
    assert float(values["peak"]) == pytest.approx(rate)
    assert recipe.schedule.epochs * recipe.input.views == epochs
    assert int(values["steps"].replace(",", "")) > 0


@pytest.mark.parametrize("name", BOOTSTRAPPED)
def test_bootstrapped_numbers(name: str) -> None:
    """Trained are the new parameters and the tuned blocks, and nothing else."""
    parameters, new, gmac = BOOTSTRAPPED[name]
    method = method_of(load_recipe(name))
    size, options = count_model(method), method.recipe.objective
    dim = method.architecture.resolve(method.recipe.model).dim
    assert size.parameters == parameters
    assert (size.trained - options.tune_blocks * BLOCK[dim]) / 1e6 == pytest.approx(new, abs=0.005)
    assert method.cost().published / 1e9 == pytest.approx(gmac, abs=0.005)
    assert method.recipe.schedule.epochs == 20 and method.recipe.batch.samples == 1024
    row = f"| `{name}` |"
    (line,) = [
        line
        for line in (RECIPES.parent / "docs/systems/sparseformer_bootstrap.md").read_text().splitlines()
        if line.startswith(row)
    ]
    assert f"| {parameters:,} | {new:.1f} M | {gmac} |" in line


@pytest.mark.parametrize("name", TVTSV2)
def test_numbers_of_tvtsv2(name: str) -> None:
    """The temporal attention is new, three quarters of the text tower's blocks are frozen; the page says the same."""
    parameters, trained, gmac, samples, kept = TVTSV2[name]
    method = method_of(load_recipe(name))
    size, recipe = count_model(method), method.recipe
    assert (size.parameters, size.trained, recipe.batch.samples) == (parameters, trained, samples)
    assert method.cost().published / 1e9 == pytest.approx(gmac, abs=0.05)
    assert method.cost().tokens == {"all": 12 * kept}
    assert (recipe.schedule.milestones, recipe.schedule.epochs, recipe.optim.base_lr) == ([6, 8], 10, 1e-4)
    page = (RECIPES.parent / "docs/systems/tvtsv2.md").read_text()
    assert f"| `{name}` | {kept} | {parameters:,} | {trained:,} | {gmac} |" in page


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_numbers(name: str) -> None:
    parameters, gmac, rate, epochs, samples = CONTRASTIVE[name]
    method, values = method_of(load_recipe(name)), report(name)
    with torch.device("meta"):
        assert sum(value.numel() for value in method.architecture.build().parameters()) == parameters
    assert method.architecture.cost().published / 1e9 == pytest.approx(gmac, abs=0.05)
    assert float(values["peak"]) == pytest.approx(rate)
    assert (method.recipe.schedule.epochs, method.recipe.batch.samples) == (epochs, samples)
    text = (RECIPES.parent / "docs/systems/snclr.md").read_text()
    assert f"| `{name}` | {parameters:,} | {gmac:g} |" in text


@pytest.mark.parametrize("name", PROJECTORS)
def test_projectors_numbers(name: str) -> None:
    recipe = load_recipe(name)
    assert count_model(method_of(recipe)).trained == PROJECTORS[name]
    rate = recipe.optim.base_lr * recipe.batch.samples / recipe.optim.base_batch
    assert rate == recipe.batch.micro * recipe.batch.ranks / 4096 * 1e-3 and recipe.schedule.steps == 30001


def test_accumulation_is_what_deepspeed_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    values = report("vit_b_dual")
    assert (values["ranks"], values["accumulation"], values["gradient_accumulation_steps"]) == ("4", "8", "8")


def test_every_recipe_but_the_demo_is_a_row_of_the_table() -> None:
    # Whose numbers are tested beside their method.
    elsewhere = {name for name in recipe_names() if "_speed_coaug" in name}
    tables = {*PUBLISHED, *BOOTSTRAPPED, *CONTRASTIVE, *PROJECTORS, *TVTSV2, "demo"}
    assert set(recipe_names()) == tables | elsewhere


def test_giant_is_the_published_run() -> None:
    recipe, values = load_recipe("vit_g_dual"), report("vit_g_dual")
    assert (values["clips"], values["steps an epoch"], recipe.optim.clip_grad) == ("8,192", "659", 0.02)
    assert (values["visible tokens"], values["reconstructed tokens"], values["counted tokens"]) == (
        "208",
        "1,024",
        "920",
    )
    strides = {name: source.stride or recipe.input.stride for name, source in recipe.data.sources.items()}
    assert strides == {"k710": 4, "ssv2": 2, "ava": 4, "webvid2m": 4, "selfcollected": 4}


def test_names_follow_the_pattern() -> None:
    """Model, method, and data where there are several sets."""
    patterns = (
        r"demo",
        r"vit_[sblhg]_(dual|v1(_[a-z0-9]+))",
        r"sparseformer_btsp_(augreg|openai_clip)_(base|large)",
        r"(vit_[sblhg]|r50)_snclr(_[a-z0-9]+)?",
        r"clip_vit_b16_tagalign(_transformer)?",
        r"(r2plus1d18|vit_b)_speed_coaug(_(infonce|sound|vanilla|video))?_(k400|ks)",
        r"vit_(b32|b16|h14)_tvtsv2",
    )
    assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in recipe_names())
