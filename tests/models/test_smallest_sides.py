"""Pictures that are smaller than what a model first looks at are refused, by every model that takes any size."""

import pytest
import torch

from finetune.recipe import load_tune_recipe
from pretrain.models.cubes import Grid
from pretrain.models.positions import InterpolatedPositions, SinCosPositions
from pretrain.objectives.base import method_of, problems_of


@pytest.mark.parametrize(
    ("recipe", "keys", "least"),
    [
        ("sparseformer_tiny_in1k", "height width", 7),
        ("groupmixformer_t_in1k", "height width", 7),
        ("groupmixformer_b_upernet_ade20k", "crop_size", 7),
        ("tsm_r50_8f_ssv1", "height width", 7),
    ],
)
def test_a_side_less_than_the_stems_window(recipe: str, keys: str, least: int) -> None:
    def told(side: int) -> list[str]:
        words = [f"input.{key}={side}" for key in keys.split()]
        return problems_of(method_of(load_tune_recipe(recipe, words)))

    (found,) = told(least - 1)
    assert found.startswith(f"input: found {least - 1} x {least - 1} pixels, ") and f"sides from {least}, " in found
    assert told(least) == []


def test_a_model_that_is_only_counted_takes_no_memory() -> None:
    with torch.device("meta"):
        wide = SinCosPositions(1 << 20, 1 << 20).to(torch.bfloat16)
        stretched = InterpolatedPositions(Grid(8, 14, 14), Grid(8, 7, 7), 1 << 40)
    assert wide.table.shape == (1 << 20, 1 << 20) and stretched.table.is_meta
    filled = torch.nn.Sequential(SinCosPositions(6, 4).to("meta")).to_empty(device="cpu")[0]
    assert torch.equal(filled.table, SinCosPositions(6, 4).table)
