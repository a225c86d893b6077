"""Units of a SparseFormer: operations on latent tokens and their regions, in the order that their list says.

v1 and bootstrapped models are lists of the same units (systems/sparseformer.md, 2.4; sparseformer_bootstrap.md, 2.1).
Shapes: B images, N latent tokens, n class tokens in front of them, D channels, P points, a axes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.clip import ACTIVATIONS
from pretrain.models.dropout import stochastic_depth
from pretrain.models.linear import Initializer, Linear, truncated_normal
from pretrain.models.sparseformer import sparseformer_config as sizes
from pretrain.models.sparseformer.adaptive_mixing import AdaptiveMixing
from pretrain.models.sparseformer.point_sampling import PointSampler
from pretrain.models.sparseformer.regions import (
    RegionLinear,
    RegionNorm,
    first_offsets,
    moved,
    points_in,
    region_code,
    time_offsets,
)
from pretrain.models.sparseformer.sparseformer_config import Config, Constants, Operation, UnitShape
from pretrain.models.vit import Attention, Mlp

#: Channels inside an MLP, in multiples of those outside.
MLP_RATIO = 4


@dataclass
class Looks:
    """What a model looked at, step by step.

    Attributes:
        regions: of each sampling, float32 [B, N, 2a].
        points: of each sampling, float32 [B, N, P, a].
        samples: there, float32 [B, N, P, C].
        moves: regions behind each move, float32 [B, N, 2a].
        codes: of the regions, float32 [B, N, D].
    """

    regions: list[Tensor] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    moves: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)


class Table(nn.Embedding):
    """Learned rows, which begin as `init` makes them."""

    def __init__(self, rows: int, dim: int, init: Initializer) -> None:
        self.init = init  # before the base class, whose constructor calls reset_parameters
        super().__init__(rows, dim)

    def reset_parameters(self) -> None:
        self.init(self.weight)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Give the rows asked for, or all of them, [n, D]."""
        # Not the weight itself, which is empty again behind this module's forward under ZeRO stage 3.
        return super().forward(torch.arange(self.num_embeddings, device=self.weight.device) if rows is None else rows)


class Unit(nn.Module):
    """Operations on tokens, each a residual branch, applied `repeats` times with the same weights.

    Args:
        shape: of the unit.
        config: of the model, full.
        rates: of stochastic depth, of each application.
    """

    roi_offset_bias: nn.Parameter | None
    stage_embedding: Table | None

    def __init__(self, shape: UnitShape, config: Config, rates: Sequence[float]) -> None:
        super().__init__()
        constants, dim = sizes.constants_of(config), shape.dim
        self.operations, self.constants, self.static = shape.operations, constants, config.offsets == "static"
        self.axes = 3 if config.video else 2
        self.time_eps = config.time_eps if config.temporal_offsets == "spread" else constants.offset_eps
        self.register_parameter("roi_offset_bias", None)
        stages = constants.stages and shape.repeats > 1
        self.register_module("stage_embedding", Table(shape.repeats, dim, nn.init.normal_) if stages else None)
        if "sample" in shape.operations:
            self._add_sampling(config, constants, dim)
        if "code" in shape.operations:
            self.pe_transition = _normed_linear(dim, constants.norm_eps)
            if config.video:
                # Of the times alone, and zero: so an image model's weights keep their meaning.
                self.time_transition = Linear(dim, dim, bias=False, init=nn.init.zeros_)
        if "move" in shape.operations:
            self.roi_adjust_module = _adjustment(dim, 2 * self.axes, constants)
        if "attend" in shape.operations:
            self.norm1 = nn.LayerNorm(dim, eps=constants.norm_eps)
            self.attn = Attention(dim, sizes.heads_of(config, dim), bias="all", init=truncated_normal)
        if "mlp" in shape.operations:
            self.norm2 = nn.LayerNorm(dim, eps=constants.norm_eps)
            # Officially CLIP's activation stands in the inherited units alone.
            activation = ACTIVATIONS["gelu" if shape.repeats > 1 else config.activation or "gelu"]
            self.mlp = Mlp(dim, MLP_RATIO * dim, init=truncated_normal, activation=activation)
        # One for each branch of each application: draws are by a layer's name.
        self.drop_paths = nn.ModuleList(
            nn.ModuleDict({name: stochastic_depth(self._rate(name, rate)) for name in shape.operations})
            for rate in rates
        )

    def forward(
        self, tokens: Tensor, regions: Tensor, maps: Tensor, repeat: int = 0, looks: Looks | None = None
    ) -> tuple[Tensor, Tensor]:
        """Transform tokens [B, n+N, D] with regions float32 [B, N, 2a] that look at maps [B, C, (T,) H, W].

        Args:
            repeat: which application of the unit this is.
            looks: what was looked at is added here.
        """
        if self.stage_embedding is not None:
            tokens = tokens + self.stage_embedding(torch.full((1,), repeat, device=tokens.device))
        drop_paths: Any = self.drop_paths[repeat]
        for name in self.operations:
            drop_path = drop_paths[name]
            if name == "attend":
                tokens = tokens + drop_path(self.attn(self.norm1(tokens)))
            elif name == "mlp":
                tokens = tokens + drop_path(self.mlp(self.norm2(tokens)))
            elif name == "move":
                regions = moved(regions, drop_path(self.roi_adjust_module(_latent(tokens, regions))))
                if looks is not None:
                    looks.moves.append(regions)
            elif name == "sample":
                tokens = _added(tokens, drop_path(self._sampled(_latent(tokens, regions), regions, maps, looks)))
            else:
                tokens = _added(tokens, self._code(regions, tokens, looks))
        return tokens, regions

    def _add_sampling(self, config: Config, constants: Constants, dim: int) -> None:
        points, out_points = config.points or 0, sizes.out_points_of(config)
        offsets = first_offsets(points, constants.scattered)
        if config.video:
            times = time_offsets(points) if config.temporal_offsets == "spread" else torch.zeros(points)
            offsets = torch.cat((offsets, times[:, None]), dim=1)
        self.roi_offset_bias = nn.Parameter(offsets.flatten().clone())
        # Not zero in the train code, by an oversight that its results are of.
        weight = truncated_normal if constants.scattered else nn.init.zeros_
        self.roi_offset_module = nn.Sequential(
            RegionNorm(dim, eps=constants.norm_eps), RegionLinear(dim, points * self.axes, bias=False, init=weight)
        )
        self.sampler = PointSampler(constants.padding, constants.clamped, config.temporal_offsets == "spread")
        hidden = sizes.generator_dim_of(config, dim)
        self.adaptive_mixing = AdaptiveMixing(
            dim, config.channels or 0, points, out_points, hidden, constants.mixing_bias, constants.generator_eps
        )

    def _rate(self, name: Operation, rate: float) -> float:
        return 0.0 if name == "code" or (name == "move" and self.constants.adjust_hidden) else rate

    def _sampled(self, tokens: Tensor, regions: Tensor, maps: Tensor, looks: Looks | None) -> Tensor:
        points = self._points(tokens, regions)
        samples = self.sampler(maps, points)
        if looks is not None:
            looks.regions.append(regions)
            looks.points.append(points)
            looks.samples.append(samples)
        mixed: Tensor = self.adaptive_mixing(samples, tokens)
        return mixed

    def _points(self, tokens: Tensor, regions: Tensor) -> Tensor:
        assert self.roi_offset_bias is not None, "a unit that samples has one"
        offsets = self.roi_offset_bias.to(regions.dtype)
        if self.static:
            offsets = offsets.expand(*regions.shape[:2], -1)
        else:
            offsets = offsets + self.roi_offset_module(tokens)
        return points_in(regions, offsets.unflatten(-1, (-1, self.axes)), self.constants.offset_eps, self.time_eps)

    def _code(self, regions: Tensor, tokens: Tensor, looks: Looks | None) -> Tensor:
        dim = tokens.shape[-1]
        low, high = regions.chunk(2, dim=-1)
        code = region_code(torch.cat((low[..., :2], high[..., :2]), dim=-1), dim)
        if looks is not None:
            looks.codes.append(code)
        added: Tensor = self.pe_transition(code.to(tokens.dtype))
        if self.axes == 2:
            return added
        times = region_code(torch.cat((low[..., 2:], high[..., 2:]), dim=-1), dim)
        return added + self.time_transition(times.to(tokens.dtype))


def _latent(tokens: Tensor, regions: Tensor) -> Tensor:
    """Leave class tokens out, which have no region."""
    return tokens[:, tokens.shape[1] - regions.shape[1] :]


def _added(tokens: Tensor, update: Tensor) -> Tensor:
    """Add to the latent tokens alone."""
    classes = tokens.shape[1] - update.shape[1]
    return tokens + (F.pad(update, (0, 0, classes, 0)) if classes else update)


def _normed_linear(dim: int, eps: float) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim, eps=eps), Linear(dim, dim, init=truncated_normal))


def _adjustment(dim: int, outputs: int, constants: Constants) -> nn.Sequential:
    norm = RegionNorm(dim, eps=constants.norm_eps)
    last = RegionLinear(dim, outputs, bias=False, init=nn.init.zeros_)
    if not constants.adjust_hidden:
        return nn.Sequential(norm, last)
    return nn.Sequential(norm, RegionLinear(dim, dim, init=truncated_normal), nn.GELU(), last)
