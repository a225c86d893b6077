"""Contrast of two crops of a picture with each other, all pictures of the batch, and a queue of earlier ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.checkpoint.rank_state import RankState
from pretrain.data.samples import Batch
from pretrain.models.base import Classifier, Cost
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Method, WholeBatchObjective
from pretrain.runtime.collectives import gather_with_gradient, own_rows
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


class QueueContrastMethod(Method):
    """Contrast on pairs of crops."""

    INPUT = "image_pairs"
    MODEL = Classifier

    def samples(self) -> ImagePairs:
        return ImagePairs(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "QueueContrast":
        model = self.architecture.build()
        return QueueContrast(model, self.recipe.model.dim, self.recipe.objective)

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        return cost


METHOD = QueueContrastMethod


class QueueContrast(WholeBatchObjective):
    """InfoNCE over the global batch and the queue."""

    cross_rank_batch_norm = True

    def __init__(self, model: nn.Module, dim: int, options: Config) -> None:
        super().__init__()
        self.model, self.options = model, options
        self.normalization, self.norm = PixelNormalization(), nn.BatchNorm1d(dim)
        self.queue = F.normalize(torch.randn(options.queue, dim, generator=torch.Generator().manual_seed(5)), dim=1)
        self.keys = self.queue[:0]

    def features(self, batch: Batch) -> Tensor:
        pixels = self.normalization(unit_pixels(batch["video"]))
        found: Tensor = self.model.forward_features(pixels).float()
        return found

    def embed(self, batch: Batch) -> Embeddings:
        return {"crops": F.normalize(self.norm(self.features(batch)), dim=1).unflatten(0, (-1, 2))}

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        crops = embeddings["crops"]
        ranks = present_ranks(crops.device)
        queries, keys = crops[:, 0], gather_with_gradient(crops[:, 1].contiguous(), ranks)
        logits = torch.cat([queries @ keys.t(), queries @ self.queue.to(crops.device).t()], dim=1)
        loss = F.cross_entropy(logits / self.options.temperature, own_rows(len(queries), ranks).to(crops.device))
        self.keys = keys.detach()
        return loss, {"positive": (queries * crops[:, 1]).sum(1).mean().detach()}

    def after_step(self) -> None:
        # Behind the update: a step that was left out leaves the queue as it was, too.
        self.queue.copy_(torch.cat([self.keys.to(self.queue), self.queue])[: len(self.queue)])

    def rank_state(self) -> dict[str, RankState]:
        return {"queue": RankState(self.queue, "same_on_all")}
