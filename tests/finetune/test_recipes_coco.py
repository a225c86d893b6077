"""Recipes of detection on COCO: each loads, is sound, says what its specification recommends; commands of the page."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from finetune.commands.finetune import main as finetune_main
from finetune.recipe import load_tune_recipe
from pretrain.engine.build import count_model
from pretrain.objectives.base import method_of, problems_of
from pretrain.recipe.files import recipe_names

ROOT = Path(__file__).resolve().parents[2]
#: Size, drop path, passes, milestones (systems/groupmixformer.md, sections 3 and 4; the usual 1x and 3x).
GROUPMIXFORMER: dict[str, tuple[str, float, int, list[int]]] = {
    f"groupmixformer_{letter}_maskrcnn_coco_{length}": (size, drop_path, epochs, milestones)
    for letter, size, drop_path in (
        ("mobile", "mobile", 0.1), ("t", "tiny", 0.1), ("s", "small", 0.2), ("b", "base", 0.5)
    )
    for length, epochs, milestones in (("1x", 12, [8, 11]), ("3x", 36, [27, 33]))
    if (letter, length) != ("mobile", "3x")
}  # fmt: skip


def test_there_is_a_recipe_for_every_row() -> None:
    names = {name for name in recipe_names("finetune") if "coco" in name}
    assert names == {*GROUPMIXFORMER, "vit_b_maskrcnn_coco"}


@pytest.mark.parametrize("name", GROUPMIXFORMER)
def test_recommended_numbers(name: str) -> None:
    size, drop_path, epochs, milestones = GROUPMIXFORMER[name]
    method = method_of(load_tune_recipe(name))
    assert problems_of(method) == []
    recipe: Any = method.recipe
    assert (recipe.model.size, recipe.model.drop_path, recipe.model.classes) == (size, drop_path, 80)
    assert (recipe.optim.base_lr, recipe.optim.weight_decay, recipe.batch.samples) == (1e-4, 0.05, 16)
    assert (recipe.schedule.epochs, recipe.schedule.milestones) == (epochs, milestones)
    assert (recipe.input.short_side, recipe.input.long_side, recipe.input.size) == (800, 1333, (1, 800, 1088))
    sides = recipe.input.train_sides
    assert sides is None if epochs == 12 else (min(sides), max(sides), len(sides)) == (480, 800, 11)


def test_sizes_of_two() -> None:
    """Parameters: backbone, pyramid and torchvision's heads; of the plain ViT as well."""
    counts = {}
    for name in ("groupmixformer_b_maskrcnn_coco_1x", "vit_b_maskrcnn_coco"):
        method = method_of(load_tune_recipe(name))
        assert problems_of(method) == []
        counts[name] = count_model(method).parameters
    assert counts == {"groupmixformer_b_maskrcnn_coco_1x": 65_575_813, "vit_b_maskrcnn_coco": 108_906_933}
    recipe: Any = method.recipe
    assert (recipe.schedule.epochs, recipe.optim.layer_decay, recipe.input.size) == (100, 0.7, (1, 1024, 1024))


def test_commands_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that need no data."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/systems/coco_detection.md").read_text(), re.DOTALL)
    for line in block.splitlines():
        program, script, *words = shlex.split(line)
        assert (program, script) == ("python", "launch/finetune.py") and finetune_main(words) == 0, line
    assert "proposals" in capsys.readouterr().out
