"""TVTSv2's video tower with a classifier on its video embedding: linear probes and fine-tuning.

Source: systems/tvtsv2.md, section 6. The embedding is what zero-shot compares, behind norm and projection, not
normalised.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain.models import tvtsv2
from pretrain.models.backbone import build_head
from pretrain.models.base import Classifier, Cost
from pretrain.models.clip_weights import our_names
from pretrain.models.cubes import Grid, grid_of
from pretrain.models.formats import plain_state
from pretrain.models.official_names import OfficialNames, Renamed
from pretrain.models.recompute import Recompute
from pretrain.models.tvtsv2 import TVTSv2Architecture, VideoTower, resolved, tower_problems, video_macs
from pretrain.models.tvtsv2_weights import NEW, is_official, official_names, own_names


@dataclass
class Config(tvtsv2.Config):
    """The video tower with a head; the text tower's sizes are not looked at."""

    name: str = "tvtsv2_classifier"
    """architecture: pretrain/models/<name>.py"""
    classes: int = 400
    """outputs of the head; 0: no head, the model gives embeddings"""


class TVTSv2Classifier(OfficialNames):
    """Classifies clips by their embedding."""

    def __init__(self, config: Config, activation_checkpointing: Recompute = False) -> None:
        super().__init__()
        self.config = config
        self.tower = VideoTower(config, activation_checkpointing)
        self.head = build_head("linear", resolved(config).embedding, config.classes, scale=1.0)

    def forward(self, video: Tensor) -> Tensor:
        """Compute logits [B, classes] of normalised clips [B, T, H, W, 3]."""
        return self.forward_head(self.forward_features(video))

    def forward_features(self, video: Tensor, pooled: bool = True) -> Tensor:
        """Compute embeddings [B, E], or with `pooled` false those of all tokens, class token first, [B, 1+T*P, E]."""
        return self.tower.forward_head(self.tower.forward_features(video).tokens, pooled)

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of embeddings [B, E]."""
        logits: Tensor = self.head(features)
        return logits

    def from_official(self, state: Mapping[str, Tensor]) -> Renamed:
        """Take the video tower of a TVTSv2, official or ours, or of a CLIP; or an earlier classifier."""
        if any(key.startswith("tower.") for key in state):
            return Renamed(dict(state), "own")
        if is_official(state):
            layout, named = "official TVTSv2", own_names(state)
        elif "visual.times.table" in state:
            layout, named = "TVTSv2", dict(state)
        else:
            layout, named = "CLIP", our_names(state)
        found = {key.replace("visual.", "tower.", 1): value for key, value in named.items()}
        missing = tuple(f"tower.{pattern}" for pattern in NEW) if layout == "CLIP" else ()
        return Renamed(found, layout, missing, ("text.*", "sorting.*", "logit_scale"))

    def to_official(self) -> dict[str, Tensor]:
        """Give the tower under its official names; the head under ours, since the published code has none."""
        state = plain_state(self)
        tower = {key.replace("tower.", "visual.", 1): value for key, value in state.items() if key.startswith("tower.")}
        return official_names(tower) | {key: value for key, value in state.items() if key.startswith("head.")}


class TVTSv2ClassifierArchitecture(Classifier):
    """The video tower with a head as a recipe describes it."""

    official_layout = True

    @staticmethod
    def resolve(config: Any) -> Any:
        """Fill in what the configuration leaves to its size."""
        return resolved(config)

    def problems(self) -> list[str]:
        found = tower_problems(self.config) or TVTSv2Architecture(self.config, self.input).problems()
        if self.config.classes < 0:
            found.append(f"model.classes={self.config.classes}: 0 (no head) or more is needed")
        return found

    def build(self, activation_checkpointing: Recompute = False) -> TVTSv2Classifier:
        return TVTSv2Classifier(self.config, activation_checkpointing)

    def cost(self) -> Cost:
        full, (frames, height, width) = resolved(self.config), self.input.size
        macs = video_macs(full, (frames, height, width)) | {"head": float(full.embedding * full.classes)}
        return Cost(macs, {"all": self.token_grid(frames, height, width).tokens})

    def layer_of(self, name: str) -> tuple[int, int]:
        depth = resolved(self.config).depth
        own = name.removeprefix("tower.")
        if own.startswith("blocks."):
            return int(own.split(".")[1]) + 1, depth + 1
        return (0 if own.startswith(("embed.", "times.", "norm_pre.")) else depth + 1), depth + 1

    def token_grid(self, frames: int, height: int, width: int) -> Grid:
        return grid_of(frames, height, width, 1, resolved(self.config).patch_size)


ARCHITECTURE = TVTSv2ClassifierArchitecture
