"""Contrast of two crops of a picture with each other, all pictures of the batch, and a queue of earlier ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.checkpoint.rank_state import RankState
from pretrain.data.samples import Batch
from pretrain.models.averages import MomentumTeacher
from pretrain.models.base import Classifier, Cost
from pretrain.models.formats import export_safetensors
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Export, Method, WholeBatchObjective
from pretrain.runtime.collectives import gather, own_rows
from pretrain.runtime.gradient_cache import Embeddings
from pretrain.runtime.process_group import present_ranks
from pretrain.samples.image_pairs import ImagePairs


@dataclass
class Config:
    """The loss."""

    name: str = "queue_contrast"
    """method: pretrain/objectives/<name>.py"""
    queue: int = 24
    """earlier pictures that are compared with"""
    temperature: float = 0.2
    """divides similarities"""
    momentum: float = 0.8
    """share that the key encoder keeps at each step"""


class QueueContrastMethod(Method):
    """Contrast on pairs of crops."""

    INPUT = "image_pairs"
    MODEL = Classifier

    def samples(self) -> ImagePairs:
        return ImagePairs(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "QueueContrast":
        model, twin = self.architecture.build(), self.architecture.build()
        return QueueContrast(model, twin, self.recipe.model.dim, self.recipe.objective)

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        return cost

    def exports(self, source: Path) -> dict[str, Export]:
        return {"safetensors": Export(self._write, "`run.init_weights=FOLDER` of another run.")}

    def _write(self, objective: Any, dest: str) -> str:
        export_safetensors(objective.model, self.recipe, dest)
        return ""


METHOD = QueueContrastMethod


class QueueContrast(WholeBatchObjective):
    """InfoNCE over the global batch and the queue, keys from a momentum teacher."""

    def __init__(self, model: nn.Module, twin: nn.Module, dim: int, options: Config) -> None:
        super().__init__()
        self.model, self.teacher, self.options = model, MomentumTeacher(model, twin), options
        self.normalization = PixelNormalization()
        self.queue = F.normalize(torch.randn(options.queue, dim, generator=torch.Generator().manual_seed(5)), dim=1)
        self.keys = self.queue[:0]

    def embed(self, batch: Batch) -> Embeddings:
        first, second = self.normalization(unit_pixels(batch["video"])).unflatten(0, (-1, 2)).unbind(1)
        queries, keys = self.model(first).float(), self.teacher(second).float()
        return {"queries": F.normalize(queries, dim=1), "keys": F.normalize(keys, dim=1)}

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        queries = embeddings["queries"]
        ranks = present_ranks(queries.device)
        self.keys = gather(embeddings["keys"], ranks)
        logits = torch.cat([queries @ self.keys.t(), queries @ self.queue.to(queries.device).t()], dim=1)
        loss = F.cross_entropy(logits / self.options.temperature, own_rows(len(queries), ranks).to(queries.device))
        return loss, {"positive": (queries * embeddings["keys"]).sum(1).mean().detach()}

    def after_step(self) -> None:
        # Behind the update: a step that was left out leaves the queue as it was, too.
        self.queue.copy_(torch.cat([self.keys.to(self.queue), self.queue])[: len(self.queue)])
        self.teacher.update(self.model, self.options.momentum)

    def rank_state(self) -> dict[str, RankState]:
        return {"queue": RankState(self.queue, "same_on_all")}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch["video"].unflatten(0, (-1, 2)).unbind(1)
        return {"query": first, "key": second}
