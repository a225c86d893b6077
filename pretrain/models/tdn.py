"""TDN, a residual network over segments of a video that looks at differences between frames and between segments.

Temporal Difference Networks for Efficient Action Recognition, Wang et al. 2021 (arXiv 2012.10071); systems/tdn.md from
MCG-NJU/TDN @ a7c7e9b. A clip is T segments of five consecutive frames, of which the middle one is seen as a picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError
from pretrain.models import tdn_weights
from pretrain.models.base import Classifier, Cost, side_problems
from pretrain.models.formats import plain_state
from pretrain.models.official_names import Renamed
from pretrain.models.recompute import Recompute
from pretrain.models.resnet import (
    BLOCKS,
    EXPANSION,
    STEM_WINDOW,
    FrameBottleneck,
    FrameConvolution,
    FrameStem,
    build_stage,
    build_stages,
    count_products,
    layer_of_stage,
    stage_problems,
)
from pretrain.models.segment_network import SegmentNetwork

#: Channels of a block for each one inside its long-term module.
REDUCTION = 16
#: Channels of a block for each one that begins as a shift to one side.
SHIFT_DIVISOR = 8
#: Share of the pictures' path where it meets the differences' path: with 8 segments, and with any other number.
PICTURE_SHARE, PICTURE_SHARE_OTHER = 0.5, 0.75
#: Smallest side whose last maps can be halved, pixels.
SMALLEST_SIDE = 33


@dataclass
class Config:
    """Temporal difference networks."""

    name: str = "tdn"
    """architecture: pretrain/models/<name>.py"""
    depth: int = 50
    """layers of the residual network: 50 or 101"""
    width: int = 64
    """channels behind the first convolution; 32 times as many leave the last stage"""
    blocks: list[int] | None = None
    """blocks of each of the four stages; null: those of the depth"""
    classes: int = 174
    """outputs of the head"""
    dropout: float = 0.5
    """probability that a feature of a segment is left out in front of the head"""
    window: int = 5
    """consecutive frames of a segment (input.window): 5; without short_term any odd number, of which the middle one is
    seen"""
    short_term: bool = True
    """differences of the five frames join the first two stages (S-TDM)"""
    long_term: bool = True
    """differences between neighbouring segments gate the blocks of stages 2 to 4 (L-TDM)"""
    temporal: bool = True
    """blocks of stages 2 to 4 have a learned convolution over segments, which begins as a shift"""
    picture_share: float | None = None
    """share of the pictures' path where it meets the differences' path; null: 0.5 with 8 segments and 0.75 with any
    other number (official)"""


class ShortTermDifference(nn.Module):
    """Differences of the five frames of a segment, in a path of its own beside the first stage (S-TDM)."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = FrameStem(12, width, bias=False)
        self.stage = build_stage(blocks, width, width, 1, partial(FrameBottleneck, bias=True))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what joins the first and the second stage.

        Args:
            frames: pixels [N, 5, 3, H, W].

        Returns:
            [N, width, H/8, W/8] and [N, 4 width, H/8, W/8].
        """
        differences = (frames[:, 1:] - frames[:, :-1]).flatten(1, 2)
        early = self.stem(F.avg_pool2d(differences, 2, 2))
        return early, self.stage(early)


class LongTermDifference(nn.Module):
    """Gate by differences between neighbouring segments, in both directions (L-TDM).

    Args:
        channels: of the block inside.
        segments: T.
    """

    def __init__(self, channels: int, segments: int) -> None:
        super().__init__()
        self.segments, inner = segments, channels // REDUCTION
        self.squeeze, self.squeeze_bn = FrameConvolution(channels, inner, 1), nn.BatchNorm2d(inner)
        self.neighbour = FrameConvolution(inner, inner, 3, groups=inner)
        self.coarse, self.coarse_bn = FrameConvolution(inner, inner, 3), nn.BatchNorm2d(inner)
        self.fine, self.fine_bn = FrameConvolution(inner, inner, 3), nn.BatchNorm2d(inner)
        self.expand, self.expand_bn = FrameConvolution(inner, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale features [B*T, C, h, w] by factors from 0.5 to 1.5."""
        squeezed = self.squeeze_bn(self.squeeze(x))
        own = squeezed.unflatten(0, (-1, self.segments))
        # The convolved feature is the neighbour in both directions: backward is not the negative of forward.
        other = self.neighbour(squeezed).unflatten(0, (-1, self.segments))
        nothing = own.new_zeros(own[:, :1].shape)
        forward = torch.cat((other[:, 1:] - own[:, :-1], nothing), dim=1)
        backward = torch.cat((nothing, other[:, :-1] - own[:, 1:]), dim=1)
        # One after the other: batch norms see each direction by itself, and update their averages twice, forward first.
        gate = 0.5 * self._gate(forward.flatten(0, 1)) + 0.5 * self._gate(backward.flatten(0, 1))
        return x + x * gate

    def _gate(self, difference: Tensor) -> Tensor:
        coarse = self.coarse_bn(self.coarse(F.avg_pool2d(difference, 2, 2)))
        coarse = F.interpolate(coarse, size=difference.shape[-2:], mode="nearest")
        fine = self.fine_bn(self.fine(difference))
        mixed = (difference + coarse + fine) * (1 / 3)
        return torch.sigmoid(self.expand_bn(self.expand(mixed))) - 0.5


class TemporalConvolution(nn.Module):
    """Depth-wise convolution over segments that begins as a shift: an eighth of the channels each way."""

    def __init__(self, channels: int, segments: int) -> None:
        super().__init__()
        self.segments = segments
        self.conv = nn.Conv1d(channels, channels, 3, padding=1, groups=channels, bias=False)
        fold = channels // SHIFT_DIVISOR
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:fold, 0, 2] = 1
            self.conv.weight[fold : 2 * fold, 0, 0] = 1
            self.conv.weight[2 * fold :, 0, 1] = 1

    def forward(self, x: Tensor) -> Tensor:
        """Mix the segments of features [B*T, C, h, w] at each place."""
        height, width = x.shape[-2:]
        series = x.unflatten(0, (-1, self.segments)).permute(0, 3, 4, 2, 1)
        mixed = self.conv(series.flatten(0, 2))
        return mixed.view(-1, height, width, *mixed.shape[1:]).permute(0, 4, 3, 1, 2).flatten(0, 1)


class DifferenceBottleneck(FrameBottleneck):
    """Bottleneck with a long-term module and a temporal convolution in front of its 3x3 convolution."""

    long_term: LongTermDifference | None
    temporal: TemporalConvolution | None

    def __init__(self, options: Config, segments: int, inputs: int, planes: int, stride: int) -> None:
        super().__init__(inputs, planes, stride, bias=True)
        self.long_term = LongTermDifference(planes, segments) if options.long_term else None
        self.temporal = TemporalConvolution(planes, segments) if options.temporal else None

    def between(self, x: Tensor) -> Tensor:
        x = x if self.long_term is None else self.long_term(x)
        return x if self.temporal is None else self.temporal(x)


class TDN(SegmentNetwork):
    """Temporal difference network.

    Args:
        options: model section of the recipe.
        segments: T.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        RecipeError: the configuration can't be built.
    """

    def __init__(self, options: Config, segments: int, activation_checkpointing: Recompute = False) -> None:
        if problems := check(options):
            raise RecipeError(problems)
        channels = EXPANSION * 8 * options.width
        super().__init__(
            segments, options.window, channels, options.classes, options.dropout, activation_checkpointing
        )
        self.options = options
        width, blocks = options.width, blocks_of(options)
        self.stem = FrameStem(3, width, bias=True)
        self.short_term = ShortTermDifference(width, blocks[0]) if options.short_term else None
        plain, gated = partial(FrameBottleneck, bias=True), partial(DifferenceBottleneck, options, segments)
        self.stages = build_stages(width, blocks, (plain, gated, gated, gated))

    @property
    def picture_share(self) -> float:
        """Share of the pictures' path where the paths meet."""
        if self.options.picture_share is not None:
            return self.options.picture_share
        return PICTURE_SHARE if self.segments == 8 else PICTURE_SHARE_OTHER

    def maps(self, frames: Tensor) -> Tensor:
        x = self.stem(frames[:, self.window // 2])
        first, *later = self.stages
        if self.short_term is None:
            x = self.run(first, x)
        else:
            early, late = self.short_term(frames)
            x = self._joined(self.run(first, self._joined(x, early)), late)
        for stage in later:
            x = self.run(stage, x)
        return x

    def from_official(self, state: Mapping[str, Tensor]) -> Renamed:
        return tdn_weights.renamed(state)

    def to_official(self) -> dict[str, Tensor]:
        return tdn_weights.official_state(plain_state(self))

    def _joined(self, pictures: Tensor, differences: Tensor) -> Tensor:
        enlarged = F.interpolate(differences, size=pictures.shape[-2:], mode="nearest")
        return self.picture_share * pictures + (1 - self.picture_share) * enlarged


def blocks_of(options: Config) -> tuple[int, ...]:
    """Tell the blocks of each stage."""
    return BLOCKS[options.depth] if options.blocks is None else tuple(options.blocks)


def check(options: Config) -> list[str]:
    """List what keeps the network from being built."""
    found = stage_problems(options, "width", "classes", "window")
    if options.blocks is None and options.depth not in BLOCKS:
        found.append(f"model.depth={options.depth}, allowed: {', '.join(map(str, BLOCKS))}")
    if options.picture_share is not None and not 0 < options.picture_share <= 1:
        found.append(f"model.picture_share={options.picture_share}, allowed: above 0 and up to 1")
    if options.long_term and options.width % (REDUCTION // 2):
        found.append(f"model.width={options.width}: no multiple of {REDUCTION // 2}, which long_term needs")
    if options.short_term and options.window != 5:
        found.append(f"model.window={options.window}, allowed with model.short_term=true: 5, it sees 5 frames")
    if options.window % 2 == 0:
        found.append(f"model.window={options.window}, allowed: an odd number, whose middle frame is the picture")
    return found


class TDNArchitecture(Classifier):
    """A temporal difference network as a recipe describes it; its input is segments of consecutive frames."""

    any_size = True
    full_precision = True
    official_layout = True

    def problems(self) -> list[str]:
        found, config = check(self.config), self.config
        window = getattr(self.input, "window", None)
        if window is None:
            found.append(f"input.name: found {self.input.name}; tdn sees segments, set input.name=segments")
        elif window != config.window:
            found.append(f"input.window={window}, and model.window={config.window}; make them the same")
        smallest = min(self.input.size[1:])
        if config.long_term and smallest < SMALLEST_SIDE:
            found.append(f"input.height, input.width: found {smallest}, allowed with model.long_term: from 33")
            return found
        return found + side_problems(self.input.size, config.name, STEM_WINDOW, "the stem's window")

    def build(self, activation_checkpointing: Recompute = False) -> TDN:
        return TDN(self.config, self._segments, activation_checkpointing)

    def cost(self) -> Cost:
        with torch.device("meta"):
            return Cost(count_products(self.build(), torch.empty(1, *self.input.size, 3), _part_of))

    def layer_of(self, name: str) -> tuple[int, int]:
        return layer_of_stage(name, blocks_of(self.config))

    @property
    def _segments(self) -> int:
        return int(self.input.size[0]) // int(self.config.window)


def _part_of(name: str) -> str:
    parts = {"short_term": "short-term differences", "long_term": "long-term differences",
             "temporal": "temporal convolutions", "head": "head"}  # fmt: skip
    return next((part for word, part in parts.items() if word in name.split(".")), "residual network")


ARCHITECTURE = TDNArchitecture
