"""Sentences from features: each byte is predicted from those before it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from pretrain.data.samples import Batch, Place, Sample, SourceInfo
from pretrain.models.base import Cost
from pretrain.objectives.base import Method, Objective, Output
from pretrain.runtime.process_group import Ranks
from pretrain.samples.described_features import DescribedFeatures
from pretrain.trained.load_run import load_trained


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

    def test(self, ranks: Ranks, which: str | None = None) -> dict[str, float]:
        ((name, source),) = self.recipe.data.sources.items()
        index, samples = load_index(source.shards), self.samples()
        reader, info, told = SampleReader([index], None, 10.0), SourceInfo(name, index.shards, source), []
        for row in range(index.samples):
            place, members = Place(0, row, 0, 0, row), parse_sample(reader.read(0, 0, row))
            told.append(Sample(place, members.key, samples(place, info, members)))
        batch, run = samples.collate(told), Path(self.recipe.run.dir)
        objective: Any = load_trained(run, {"finetune": type(self.recipe)}).objective
        written = objective.write(batch["features"], batch["ids"].shape[1])
        if ranks.first:
            (run / "narration.bin").write_bytes(bytes(written.flatten().tolist()))
        return {"right_bytes": float((written == batch["ids"]).float().mean())}


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
