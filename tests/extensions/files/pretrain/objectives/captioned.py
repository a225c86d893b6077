"""Pictures that learn to lie where a frozen text tower puts their captions."""

import functools
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.samples import Batch
from pretrain.models.base import Classifier, Cost
from pretrain.models.frozen import Frozen
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Method, Objective, Output
from pretrain.samples.captioned_images import CaptionedImages


@dataclass
class Config:
    """The tower."""

    name: str = "captioned"
    """method: pretrain/objectives/<name>.py"""
    tower: str = ""
    """safetensors file of the text tower"""
    words: int = 64
    """size of its table"""


class Words(nn.Module):
    """The mean of word vectors."""

    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, dim)

    def forward(self, ids: Tensor) -> Tensor:
        mean: Tensor = self.table(ids).mean(1)
        return mean


def fill(tower: nn.Module, place: str) -> None:
    """Copy the weights of a file, strictly."""
    tower.load_state_dict(safetensors.torch.load_file(place))


class CaptionedMethod(Method):
    """Alignment with a frozen tower."""

    INPUT = "captioned_images"
    MODEL = Classifier

    def samples(self) -> CaptionedImages:
        return CaptionedImages(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "Captioned":
        options = self.recipe.objective
        build = functools.partial(Words, options.words, self.recipe.model.dim)
        tower = Frozen("objective.tower", options.tower, build, fill, dtype="fp32")
        return Captioned(self.architecture.build(), tower)

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        return cost


METHOD = CaptionedMethod


class Captioned(Objective):
    """Cosine distance to the caption's embedding."""

    def __init__(self, model: nn.Module, tower: "Frozen[Words]") -> None:
        super().__init__()
        self.model: Any = model
        self.tower = tower
        self.normalization = PixelNormalization()

    def frozen_parts(self) -> "dict[str, Frozen[Words]]":
        return {"tower": self.tower}

    def forward(self, batch: Batch) -> Output:
        seen = self.model.forward_features(self.normalization(unit_pixels(batch["video"]))).float()
        loss = 1 - F.cosine_similarity(seen, self.tower(batch["ids"]).float()).mean()
        return Output(loss, {})
