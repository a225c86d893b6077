"""R(2+1)D-18: a residual network of videos, its convolutions split into space and time (Tran et al. 2018).

The variant of AVID (facebookresearch/AVID-CMA @ 4538e40): a full convolution in the stem, as many channels between two
convolutions as behind them, the maximum over time and place in front of the head; systems/speed_coaug.md, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.base import Classifier, Cost
from pretrain.models.dropout import dropout_layer
from pretrain.models.formats import plain_state
from pretrain.models.linear import Linear
from pretrain.models.official_names import OfficialNames, Renamed
from pretrain.models.recompute import Recompute, maybe_recompute
from pretrain.models.resnet import count_products, layer_of_stage, stage_problems

#: Blocks of each stage: 18 layers.
BLOCKS = (2, 2, 2, 2)
#: AVID's names of the stages.
STAGES = ("conv2x", "conv3x", "conv4x", "conv5x")
#: AVID's names of a block's parts, and ours.
PARTS = {
    "spt_conv1": "space1", "spt_bn1": "space1_bn", "tmp_conv1": "time1", "tmp_bn1": "time1_bn",
    "spt_conv2": "space2", "spt_bn2": "space2_bn", "tmp_conv2": "time2", "out_bn": "bn", "res_conv": "shortcut",
}  # fmt: skip
#: What stands in front of the network's names: AVID's, in pre-training and fine-tuning, and exports of both towers.
PREFIXES = ("video_model.", "feature_extractor.", "video_encoder.")
#: What such files hold beside it.
OTHERS = ("audio_model.*", "video_proj.*", "audio_proj.*", "audio_encoder.*", "video_head.*", "audio_head.*",
          "affinity.*", "logit_scale")  # fmt: skip


@dataclass
class Config:
    """R(2+1)D of 18 layers."""

    name: str = "r2plus1d"
    """architecture: pretrain/models/<name>.py"""
    width: int = 64
    """channels behind the first convolution; 8 times as many leave the last stage"""
    blocks: list[int] | None = None
    """blocks of each of the four stages; null: two each, 18 layers"""
    classes: int = 400
    """outputs of the head; 0: no head"""
    dropout: float = 0.5
    """probability that a feature is left out in front of the head"""


def _space(inputs: int, outputs: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)


def _time(channels: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(channels, channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)


class SplitBlock(nn.Module):
    """Two convolutions over space, each followed by one over time, beside a shortcut.

    Args:
        inputs: channels that enter.
        outputs: channels that leave.
        stride: of time and space.
    """

    shortcut: nn.Conv3d | None

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.space1, self.space1_bn = _space(inputs, outputs, stride), nn.BatchNorm3d(outputs)
        self.time1, self.time1_bn = _time(outputs, stride), nn.BatchNorm3d(outputs)
        self.space2, self.space2_bn = _space(outputs, outputs), nn.BatchNorm3d(outputs)
        self.time2, self.bn = _time(outputs), nn.BatchNorm3d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute [B, outputs, T/stride, H/stride, W/stride] of [B, inputs, T, H, W]."""
        y = F.relu(self.space1_bn(self.space1(x)))
        y = F.relu(self.time1_bn(self.time1(y)))
        y = F.relu(self.space2_bn(self.space2(y)))
        # The norm comes behind the sum, and the shortcut has none of its own.
        return F.relu(self.bn(self.time2(y) + (x if self.shortcut is None else self.shortcut(x))))


class SplitStem(nn.Module):
    """Convolution over three frames and 7 x 7 pixels, batch norm and pooling: a quarter of the size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        self.bn = nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [B, width, T, H/4, W/4] of [B, 3, T, H, W]."""
        return F.max_pool3d(F.relu(self.bn(self.conv(x))), (1, 3, 3), (1, 2, 2), (0, 1, 1))


class R2Plus1D(OfficialNames):
    """R(2+1)D with a linear head.

    Args:
        options: model section of the recipe.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        RecipeError: the configuration can't be built.
    """

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        if problems := check(options):
            raise RecipeError(problems)
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.stem = SplitStem(options.width)
        self.stages, inputs = nn.ModuleList(), options.width
        for stage, count in enumerate(blocks_of(options)):
            outputs = options.width * 2**stage
            first = SplitBlock(inputs, outputs, 1 if stage == 0 else 2)
            self.stages.append(nn.Sequential(first, *(SplitBlock(outputs, outputs, 1) for _ in range(count - 1))))
            inputs = outputs
        self.drop = dropout_layer(options.dropout)
        start = partial(nn.init.normal_, std=0.01)
        self.head: nn.Module = Linear(inputs, options.classes, init=start) if options.classes else nn.Identity()

    def forward(self, video: Tensor) -> Tensor:
        """Compute logits [B, classes] of normalised clips [B, T, H, W, 3]."""
        return self.forward_head(self.forward_features(video))

    def forward_features(self, video: Tensor, pooled: bool = True) -> Tensor:
        """Compute features of normalised clips [B, T, H, W, 3].

        Args:
            video: pixels.
            pooled: their maximum over time and place [B, C], else those of all places [B, N, C], in the order t, y, x.
        """
        x: Tensor = self.stem(video.permute(0, 4, 1, 2, 3).to(self.stem.conv.weight.dtype))
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                x = maybe_recompute(self.activation_checkpointing, block, x)
        return x.amax((2, 3, 4)) if pooled else x.flatten(2).transpose(1, 2)

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of pooled features [B, C]."""
        logits: Tensor = self.head(self.drop(features))
        return logits

    def from_official(self, state: Mapping[str, Tensor]) -> Renamed:
        return renamed(state)

    def to_official(self) -> dict[str, Tensor]:
        return {_official_name(key): value for key, value in plain_state(self).items()}

    def official_file(self) -> dict[str, Any]:
        """Give what AVID's trainer of classifiers saves: the network inside of a wrapper, and the classifier."""
        state = self.to_official().items()
        inside = {key if key.startswith("classifier.") else f"feature_extractor.{key}": value for key, value in state}
        return {"model": {f"module.{key}": value for key, value in inside.items()}}


def renamed(state: Mapping[str, Tensor]) -> Renamed:
    """Bring weights of AVID's files, or of an export of both towers, under our names.

    Raises:
        WeightsError: two tensors for one of them.
    """
    prefix = next((one for one in PREFIXES if any(key.startswith(one) for key in state)), "")
    layout = {"": "own", "video_encoder.": "both towers"}.get(prefix, "AVID")
    if layout == "own" and any(key.startswith("conv2x.") for key in state):
        layout = "AVID"
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        name = _own_name(name) if layout == "AVID" else name
        if name in named:
            raise WeightsError(f"{key}: a second tensor for {name} in one file; delete one of them")
        named[name] = value
    return Renamed(named, layout, ("head.*", "*.num_batches_tracked"), OTHERS)


def _own_name(key: str) -> str:
    first, _, rest = key.partition(".")
    if first == "conv1" and rest[:2] in ("0.", "1."):
        return ("stem.conv." if rest[0] == "0" else "stem.bn.") + rest[2:]
    if first == "classifier":
        return f"head.{rest}"
    if first in STAGES:
        block, part, *last = rest.split(".")
        return ".".join(("stages", str(STAGES.index(first)), block, PARTS.get(part, part), *last))
    return key


def _official_name(key: str) -> str:
    first, *rest = key.split(".")
    if first == "stem":
        return ".".join(("conv1", "0" if rest[0] == "conv" else "1", *rest[1:]))
    if first == "head":
        return ".".join(("classifier", *rest))
    theirs = {ours: name for name, ours in PARTS.items()}
    return ".".join((STAGES[int(rest[0])], rest[1], theirs[rest[2]], *rest[3:]))


def blocks_of(options: Config) -> tuple[int, ...]:
    """Tell the blocks of each stage."""
    return BLOCKS if options.blocks is None else tuple(options.blocks)


def check(options: Config) -> list[str]:
    """List what keeps the network from being built."""
    found = stage_problems(options, "width")
    if options.classes < 0:
        found.append(f"model.classes={options.classes}, allowed: 0 (no head) or more")
    return found


class R2Plus1DArchitecture(Classifier):
    """R(2+1)D as a recipe describes it."""

    any_size = True
    full_precision = True
    official_layout = True

    def problems(self) -> list[str]:
        found = check(self.config)
        # Of kinds of clips without windows neighbouring frames belong together already.
        if (window := getattr(self.input, "window", 1)) != 1:
            found.append(f"input.window={window}, allowed with model.name=r2plus1d: 1, frames of one clip")
        return found

    def build(self, activation_checkpointing: Recompute = False) -> R2Plus1D:
        return R2Plus1D(self.config, activation_checkpointing)

    def cost(self) -> Cost:
        with torch.device("meta"):
            pixels = torch.empty(1, *self.input.size, 3)
            return Cost(count_products(self.build(), pixels, lambda name: "head" if name == "head" else "network"))

    def layer_of(self, name: str) -> tuple[int, int]:
        return layer_of_stage(name, blocks_of(self.config))


ARCHITECTURE = R2Plus1DArchitecture
