"""Adversarial translation between two sources that are not paired: the critic first, then the translator."""

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.data.samples import Batch
from pretrain.models.base import Cost
from pretrain.objectives.base import Method, Objective, Output, Rule, decays
from pretrain.samples.raster_tiles import RasterTiles


@dataclass
class Config:
    """Least squares."""

    name: str = "translation"
    """method: pretrain/objectives/<name>.py"""


class TranslationMethod(Method):
    """Unpaired translation."""

    INPUT = "raster_tiles"

    def problems(self) -> list[str]:
        found = self.recipe.data.compose
        return [] if found == "together" else [f"data.compose: found {found}, allowed: together"]

    def samples(self) -> RasterTiles:
        return RasterTiles(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "Translation":
        objective = Translation()
        objective.model = self.architecture.build()
        return objective

    def cost(self) -> Cost:
        return Cost({"translator": 1e3})


METHOD = TranslationMethod


class Translation(Objective):
    """One loss a turn."""

    turns = ("critic", "translator")

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        return Rule(decays=decays(name, shape), turn=name.removeprefix("model.").split(".")[0])

    def forward(self, batch: Batch) -> Output:
        dtype = next(self.parameters()).dtype
        made = self.model["translator"](batch["first"].to(dtype))
        if self.turn == "critic":
            real = self.model["critic"](batch["second"].to(dtype))
            loss = (self.model["critic"](made) + 1).square().mean() + (real - 1).square().mean()
        else:
            loss = (self.model["critic"](made) - 1).square().mean()
        return Output(loss.float(), {"made": made.detach().float().mean()})
