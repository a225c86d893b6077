"""Classifiers that judge each segment of a clip by a network for pictures, and average the answers (TSN)."""

import abc
from functools import partial
from typing import Any

from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.dropout import dropout_layer
from pretrain.models.linear import Linear
from pretrain.models.official_names import OfficialNames
from pretrain.models.recompute import Recompute, maybe_recompute


class SegmentNetwork(OfficialNames):
    """A network over T segments of some frames each.

    Args:
        segments: T.
        window: frames of a segment.
        channels: of the last maps.
        classes: outputs of the head, whose weights begin with deviation 0.001.
        dropout: probability that a feature of a segment is left out in front of the head.
        activation_checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self,
        segments: int,
        window: int,
        channels: int,
        classes: int,
        dropout: float,
        activation_checkpointing: Recompute,
    ) -> None:
        super().__init__()
        self.segments, self.window, self.activation_checkpointing = segments, window, activation_checkpointing
        self.drop = dropout_layer(dropout)
        self.head = Linear(channels, classes, init=partial(nn.init.normal_, std=0.001))

    @abc.abstractmethod
    def maps(self, frames: Tensor) -> Tensor:
        """Compute the last maps [B*T, C, h, w] of segments [B*T, window, 3, H, W], a clip's next to each other."""

    def forward(self, video: Tensor) -> Tensor:
        """Compute logits [B, classes] of normalised clips [B, T * window, H, W, 3]: the mean of the segments'."""
        return self.forward_head(self.forward_features(video, pooled=False))

    def forward_features(self, video: Tensor, pooled: bool = True) -> Tensor:
        """Compute features of normalised clips.

        Args:
            video: pixels [B, T * window, H, W, 3], the frames of a segment next to each other.
            pooled: their mean over segments [B, C], else those of each [B, T, C].

        Raises:
            RecipeError: clips of another length.
        """
        if video.shape[1] != self.segments * self.window:
            # Else frames of several clips would be taken for one, wherever the product divides.
            wanted = f"{self.segments} segments x {self.window}"
            raise RecipeError(f"clips of {video.shape[1]} frames, and this model was built for {wanted}")
        frames = video.unflatten(1, (self.segments, self.window)).flatten(0, 1).permute(0, 1, 4, 2, 3)
        maps = self.maps(frames.to(self.head.weight.dtype))
        features = maps.mean((2, 3)).unflatten(0, (-1, self.segments))
        return features.mean(1) if pooled else features

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of features [B, C], or of each segment [B, T, C] and average them."""
        logits: Tensor = self.head(self.drop(features))
        return logits.mean(1) if features.dim() == 3 else logits

    def run(self, stage: Any, x: Tensor) -> Tensor:
        """Apply the blocks of a stage."""
        for block in stage:
            x = maybe_recompute(self.activation_checkpointing, block, x)
        return x
