"""TSM: a residual network for pictures whose blocks see an eighth of their channels one segment earlier, and later.

Temporal Shift Module, Lin et al. 2019 (arXiv 1811.08383); the model of MGSampler's released example
(systems/mgsampler.md section 6), with the shift inside of the residual branch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pretrain.errors import RecipeError
from pretrain.models import tsm_weights
from pretrain.models.base import Classifier, Cost, side_problems
from pretrain.models.formats import plain_state
from pretrain.models.official_names import Renamed
from pretrain.models.recompute import Recompute
from pretrain.models.resnet import (
    BLOCKS,
    EXPANSION,
    STEM_WINDOW,
    FrameBottleneck,
    FrameStem,
    build_stages,
    count_products,
    layer_of_stage,
    stage_problems,
)
from pretrain.models.segment_network import SegmentNetwork


@dataclass
class Config:
    """Residual networks of 50 layers with temporal shift."""

    name: str = "tsm"
    """architecture: pretrain/models/<name>.py"""
    width: int = 64
    """channels behind the first convolution; 32 times as many leave the last stage"""
    blocks: list[int] | None = None
    """blocks of each of the four stages; null: those of 50 layers"""
    classes: int = 174
    """outputs of the head"""
    dropout: float = 0.5
    """probability that a feature of a segment is left out in front of the head"""
    shift_divisor: int = 8
    """one of so many channels comes from the segment after, and one from that before; 0: no shift (TSN)"""


def shifted(x: Tensor, segments: int, divisor: int) -> Tensor:
    """Shift features [B*T, C, h, w]: a part of the channels one segment back, the next part one on; zeros come in."""
    series = x.unflatten(0, (-1, segments))
    back, on, rest = series.split([size := x.shape[1] // divisor, size, x.shape[1] - 2 * size], dim=2)
    nothing = torch.zeros_like(back[:, :1])
    parts = (torch.cat((back[:, 1:], nothing), dim=1), torch.cat((nothing, on[:, :-1]), dim=1), rest)
    return torch.cat(parts, dim=2).flatten(0, 1)


class ShiftBottleneck(FrameBottleneck):
    """Bottleneck whose first convolution sees shifted features; its shortcut has them as they are."""

    def __init__(self, segments: int, divisor: int, inputs: int, planes: int, stride: int) -> None:
        super().__init__(inputs, planes, stride, bias=False)
        self.segments, self.divisor = segments, divisor

    def entering(self, x: Tensor) -> Tensor:
        return shifted(x, self.segments, self.divisor) if self.divisor else x


class TSM(SegmentNetwork):
    """Temporal shift network; its segments are single frames.

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
        super().__init__(segments, 1, channels, options.classes, options.dropout, activation_checkpointing)
        self.options = options
        self.stem = FrameStem(3, options.width, bias=False)
        make = partial(ShiftBottleneck, segments, options.shift_divisor)
        self.stages = build_stages(options.width, blocks_of(options), [make] * 4)

    def maps(self, frames: Tensor) -> Tensor:
        x = self.stem(frames[:, 0])
        for stage in self.stages:
            x = self.run(stage, x)
        return x

    def from_official(self, state: Mapping[str, Tensor]) -> Renamed:
        return tsm_weights.renamed(state)

    def to_official(self) -> dict[str, Tensor]:
        return tsm_weights.official_state(plain_state(self))


def blocks_of(options: Config) -> tuple[int, ...]:
    """Tell the blocks of each stage."""
    return BLOCKS[50] if options.blocks is None else tuple(options.blocks)


def check(options: Config) -> list[str]:
    """List what keeps the network from being built."""
    found = stage_problems(options, "width", "classes")
    if options.shift_divisor != 0 and options.shift_divisor < 2:
        found.append(f"model.shift_divisor={options.shift_divisor}, allowed: 2 or more, or 0 for no shift")
    return found


class TSMArchitecture(Classifier):
    """A temporal shift network as a recipe describes it; each frame of its input is a segment."""

    any_size = True
    full_precision = True
    official_layout = True

    def problems(self) -> list[str]:
        found = check(self.config)
        found += side_problems(self.input.size, self.config.name, STEM_WINDOW, "the stem's window")
        # Of kinds of clips without windows every frame is a segment already.
        if (window := getattr(self.input, "window", 1)) != 1:
            found.append(f"input.window={window}, allowed with model.name=tsm: 1, a segment is one frame")
        return found

    def build(self, activation_checkpointing: Recompute = False) -> TSM:
        return TSM(self.config, self.input.size[0], activation_checkpointing)

    def cost(self) -> Cost:
        with torch.device("meta"):
            pixels = torch.empty(1, *self.input.size, 3)
            return Cost(count_products(self.build(), pixels, lambda name: "head" if name == "head" else "network"))

    def layer_of(self, name: str) -> tuple[int, int]:
        return layer_of_stage(name, blocks_of(self.config))


ARCHITECTURE = TSMArchitecture
