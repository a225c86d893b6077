"""Boxes in pictures: each box of a picture is regressed from its feature."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from pretrain.data.samples import Batch, Place, Sample, SourceInfo
from pretrain.models.base import Classifier, Cost
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Method, Objective, Output
from pretrain.runtime.process_group import Ranks
from pretrain.samples.boxed_images import BoxedImages


@dataclass
class Config:
    """The loss."""

    name: str = "tiny_detection"
    """task: finetune/<name>/task.py"""


class TinyDetection(Method):
    """Boxes."""

    INPUT = "boxed_images"
    MODEL = Classifier

    def samples(self) -> BoxedImages:
        return BoxedImages(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "BoxObjective":
        return BoxObjective(self.architecture.build(), self.recipe.model.dim)

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        return cost

    def evaluation(self, ranks: Ranks) -> "Overlap":
        return Overlap(self)

    def test(self, ranks: Ranks, which: str | None = None) -> dict[str, float]:
        return {"tested": 1.0}


METHOD = TinyDetection


class BoxObjective(Objective):
    """L1 of boxes."""

    def __init__(self, model: nn.Module, dim: int) -> None:
        super().__init__()
        self.model: Any = nn.ModuleDict({"backbone": model, "boxes": nn.Linear(dim, 4)})
        self.normalization = PixelNormalization()

    def boxes(self, batch: Batch) -> torch.Tensor:
        """Boxes float32 [B, 4] in shares of the picture."""
        features = self.model["backbone"].forward_features(self.normalization(unit_pixels(batch["video"])))
        found: torch.Tensor = self.model["boxes"](features).float().sigmoid()
        return found

    def forward(self, batch: Batch) -> Output:
        counts = batch["counts"]
        found = self.boxes(batch).repeat_interleave(counts, dim=0, output_size=len(batch["boxes"]))
        errors = F.l1_loss(found, batch["boxes"], reduction="none").mean(1)
        # By picture: a mean over boxes would weigh pictures by which others lie in their micro-batch.
        loss = (errors / counts.repeat_interleave(counts, output_size=len(errors))).sum() / len(counts)
        return Output(loss, {"boxes": counts.sum().float()})


class Overlap:
    """Mean error on the validation pictures."""

    every_epochs, best_by = 1.0, "closeness"

    def __init__(self, method: TinyDetection) -> None:
        (source,) = method.recipe.data.sources.values()
        self._index, self._samples = load_index(source.val), method.samples()
        self._source = SourceInfo("val", self._index.shards, source)

    def __call__(self, objective: Any) -> dict[str, float]:
        reader = SampleReader([self._index], None, 10.0)
        samples = []
        for row in range(self._index.samples):
            members = parse_sample(reader.read(0, 0, row))
            place = Place(0, row, 0, 0, row)
            samples.append(Sample(place, members.key, self._samples(place, self._source, members)))
        with torch.no_grad():
            loss = float(objective(self._samples.collate(samples)).loss)
        return {"closeness": 1 - loss}
