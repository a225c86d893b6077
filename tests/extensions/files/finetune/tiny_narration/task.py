"""Sentences from features: each byte is predicted from those before it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.samples import Batch
from pretrain.models.base import Cost
from pretrain.objectives.base import Method, Objective, Output
from pretrain.samples.described_features import DescribedFeatures


@dataclass
class Config:
    """The loss."""

    name: str = "tiny_narration"
    """task: finetune/<name>/task.py"""


class TinyNarration(Method):
    """Narration."""

    INPUT = "described_features"

    def samples(self) -> DescribedFeatures:
        return DescribedFeatures(self.recipe.input)

    def build(self) -> "Narration":
        objective = Narration()
        objective.model = self.architecture.build()
        return objective

    def cost(self) -> Cost:
        return Cost({"writer": 1e3}, {"all": self.recipe.input.context})


METHOD = TinyNarration


class Narration(Objective):
    """Cross entropy of bytes."""

    def forward(self, batch: Batch) -> Output:
        logits = self.model(batch["features"], batch["ids"]).float()
        return Output(F.cross_entropy(logits.flatten(0, 1), batch["ids"].flatten()), {})

    @torch.no_grad()
    def write(self, features: Tensor, length: int) -> Tensor:
        """Write bytes int64 [B, length] greedily."""
        ids = torch.zeros(len(features), length, dtype=torch.int64)
        for at in range(length):
            ids[:, at] = self.model(features, ids)[:, at].argmax(-1)
        return ids
