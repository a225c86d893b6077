"""A classifier as the contract asks for one, and no more: no blocks, no token grid, no channels to ask for."""

from typing import Any

from torch import Tensor, nn

from finetune.classification.task import ClassificationTask
from pretrain.models.base import Classifier, Cost


class PlainClassifier(nn.Module):
    """Means over squares of 8 x 8 pixels of each frame as tokens."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 20), nn.Linear(20, classes)

    def forward(self, video: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(video))

    def forward_features(self, video: Tensor, pooled: bool = True) -> Tensor:
        """Features of [B, T, H, W, 3]: [B, 20], or [B, T * H / 8 * W / 8, 20]."""
        squares = video.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5)).flatten(1, 3)
        tokens: Tensor = self.embed(squares.to(self.embed.weight.dtype)).tanh()
        return tokens.mean(1) if pooled else tokens

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits of pooled features."""
        logits: Tensor = self.head(features)
        return logits


class PlainArchitecture(Classifier):
    """The classifier for any recipe."""

    def problems(self) -> list[str]:
        return []

    def build(self, activation_checkpointing: Any = False) -> PlainClassifier:
        return PlainClassifier(self.config.classes)

    def cost(self) -> Cost:
        return Cost({"all": 1e3})

    def layer_of(self, name: str) -> tuple[int, int]:
        return ("embed", "head").index(name.partition(".")[0]), 1


class PlainTask(ClassificationTask):
    """Classification with it, whatever model the recipe names."""

    @property
    def architecture(self) -> PlainArchitecture:
        return PlainArchitecture(self.recipe.model, self.recipe.input)
