"""ResNet for pictures (He et al. 2015), torchvision's layout in and out; of a clip the mean of its frames' features."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models import tsm_weights
from pretrain.models.base import Classifier, Cost, MapLevel
from pretrain.models.dropout import dropout_layer
from pretrain.models.formats import plain_state
from pretrain.models.linear import Linear
from pretrain.models.official_names import OfficialNames, Renamed
from pretrain.models.recompute import Recompute, maybe_recompute
from pretrain.models.resnet import (
    BLOCKS,
    EXPANSION,
    FrameBottleneck,
    FrameStem,
    build_stages,
    count_products,
    layer_of_stage,
    stage_problems,
)

#: Stages of a ResNet, and side of a picture divided by that of the first one's map.
STAGES, FIRST_STRIDE = 4, 4


@dataclass
class Config:
    """A residual network of 50 or 101 layers."""

    name: str = "picture_resnet"
    """architecture: pretrain/models/<name>.py"""
    layers: int = 50
    """50 or 101"""
    width: int = 64
    """channels behind the first convolution; 32 times as many leave the last stage"""
    blocks: list[int] | None = None
    """blocks of each of the four stages, in place of those of `layers`"""
    classes: int = 1000
    """outputs of the head; 0: no head"""
    dropout: float = 0.0
    """probability that a feature is left out in front of the head"""


def check(options: Config) -> list[str]:
    """List what keeps the network from being built."""
    found = stage_problems(options, "width")
    if options.layers not in BLOCKS:
        found.append(f"model.layers={options.layers}, allowed: {', '.join(map(str, BLOCKS))}")
    if options.classes < 0:
        found.append(f"model.classes={options.classes}: 0 (no head) or more is needed")
    return found


class PictureResNet(OfficialNames):
    """A ResNet; takes pictures [B, 3, H, W] of any size, and clips [B, T, H, W, 3], whose frames it averages.

    Raises:
        RecipeError: the configuration can't be built.
    """

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        if problems := check(options):
            raise RecipeError(problems)
        super().__init__()
        self.options, self.activation_checkpointing = options, activation_checkpointing
        self.stem = FrameStem(3, options.width, bias=False)
        self.stages = build_stages(options.width, blocks_of(options), [partial(FrameBottleneck, bias=False)] * STAGES)
        channels = EXPANSION * 2 ** (STAGES - 1) * options.width
        self.drop = dropout_layer(options.dropout if options.classes else 0.0)
        self.head: nn.Module = nn.Identity()
        if options.classes:
            self.head = Linear(channels, options.classes, init=partial(nn.init.normal_, std=0.01))

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits [B, classes], or features without a head, of normalised pictures or clips."""
        return self.forward_head(self.forward_features(pixels))

    def forward_maps(self, pixels: Tensor) -> list[Tensor]:
        """Compute the maps [B, C, h, w] of all stages of normalised pictures [B, 3, H, W] or [B, 1, H, W, 3]."""
        frames = pixels if pixels.dim() == 4 else pixels.flatten(0, 1).permute(0, 3, 1, 2)
        x = self.stem(frames.to(self.stem.conv.weight.dtype))
        maps = []
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = maybe_recompute(self.activation_checkpointing, block, x)
            maps.append(x)
        return maps

    def forward_features(self, pixels: Tensor, pooled: bool = True) -> Tensor:
        """Compute features [B, C], or with `pooled` false those of all frames and places, row by row, [B, N, C]."""
        last = self.forward_maps(pixels)[-1]
        clips = last.unflatten(0, (len(pixels), -1))
        return clips.mean((1, 3, 4)) if pooled else clips.permute(0, 1, 3, 4, 2).flatten(1, 3)

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of features [B, C]."""
        logits: Tensor = self.head(self.drop(features))
        return logits

    def from_official(self, state: Mapping[str, Tensor]) -> Renamed:
        own = tsm_weights.renamed({key: value for key, value in state.items() if not key.startswith("fc.")})
        own.state.update({f"head.{key[3:]}": value for key, value in state.items() if key.startswith("fc.")})
        misses = () if any(key.startswith("head.") for key in own.state) else ("head.*",)
        # Encoders of self-supervised training have no classifier, and older files no counts of batches.
        return Renamed(own.state, own.layout, (*misses, "*.num_batches_tracked"))

    def to_official(self) -> dict[str, Tensor]:
        return {official_name(key): value for key, value in plain_state(self).items()}

    def official_file(self) -> dict[str, Any]:
        """Give torchvision's names as they are: its `load_state_dict` takes them."""
        return self.to_official()


def official_name(key: str) -> str:
    """Give torchvision's name of a weight."""
    key = re.sub(r"^stem\.conv\.", "conv1.", re.sub(r"^stem\.bn\.", "bn1.", key))
    key = re.sub(r"^head\.", "fc.", key)
    return re.sub(r"^stages\.(\d)\.", lambda found: f"layer{int(found[1]) + 1}.", key)


def blocks_of(options: Config) -> tuple[int, ...]:
    """Tell the blocks of each stage."""
    return BLOCKS[options.layers] if options.blocks is None else tuple(options.blocks)


class PictureResNetArchitecture(Classifier):
    """A ResNet as a recipe describes it."""

    any_size = True
    full_precision = True
    official_layout = True

    def problems(self) -> list[str]:
        return check(self.config)

    def build(self, activation_checkpointing: Recompute = False) -> PictureResNet:
        return PictureResNet(self.config, activation_checkpointing)

    def cost(self) -> Cost:
        with torch.device("meta"):
            pixels = torch.empty(1, *self.input.size, 3)
            return Cost(count_products(self.build(), pixels, lambda name: "head" if name == "head" else "network"))

    def layer_of(self, name: str) -> tuple[int, int]:
        return layer_of_stage(name, blocks_of(self.config))

    def maps(self) -> tuple[MapLevel, ...]:
        planes = (EXPANSION * self.config.width * 2**stage for stage in range(STAGES))
        return tuple(MapLevel(channels, FIRST_STRIDE * 2**stage) for stage, channels in enumerate(planes))


ARCHITECTURE = PictureResNetArchitecture
