"""VideoMAE's space-time ViT encoder and its decoder (Tong et al. 2022; Wang et al. 2023), official parameter names.

Details: systems/videomae.md sections 2 and 3, from MCG-NJU/VideoMAE and OpenGVLab/VideoMAEv2.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.base import MaskedAutoencoder
from pretrain.models.cubes import Grid, grid_of, grid_problems
from pretrain.models.encoder import PRESET_FIELDS, EncoderShape, block_macs, build_blocks, fill, missing, size_problems
from pretrain.models.linear import Linear
from pretrain.models.positions import SinCosPositions
from pretrain.models.recompute import Recompute, run_blocks
from pretrain.models.vit import CubeEmbedding


@dataclass
class Config:
    """A size and what departs from it; null means: as the size has it."""

    name: str = "videomae"
    """architecture: pretrain/models/<name>.py"""
    size: Literal["small", "base", "large", "huge", "giant", "custom"] = "base"
    """published size; custom: every field below that is null must be given"""
    patch_size: int | None = None
    """side of a cube, pixels"""
    tubelet: int = 2
    """frames of a cube"""
    dim: int | None = None
    """channels of the encoder"""
    depth: int | None = None
    """blocks of the encoder"""
    heads: int | None = None
    """attention heads of the encoder"""
    mlp_ratio: float | None = None
    """hidden channels of an MLP = int(channels x mlp_ratio), encoder and decoder alike"""
    decoder_dim: int | None = None
    """channels of the decoder"""
    decoder_depth: int | None = None
    """blocks of the decoder"""
    decoder_heads: int | None = None
    """attention heads of the decoder"""
    cosine_attention: bool = False
    """L2-normalised queries and keys with a learned scale"""
    layer_scale: float = 0.0
    """initial value of the residual branches' learned scale; 0: no such parameters"""
    drop_path: float = 0.0
    """stochastic depth rate of the last block, rising linearly from 0; encoder and decoder"""
    norm_eps: float = 1e-6
    """epsilon of every layer norm (Hugging Face models: 1e-12)"""
    decoder_norm_eps: float | None = None
    """epsilon of the decoder's last layer norm; null: norm_eps (Hugging Face models: 1e-5)"""


@dataclass(frozen=True)
class Shape(EncoderShape):
    """A resolved configuration, nothing left open."""

    decoder_dim: int
    decoder_depth: int
    decoder_heads: int


def resolve(config: Config) -> Config:
    """Fill every null in from the size."""
    eps = config.norm_eps if config.decoder_norm_eps is None else config.decoder_norm_eps
    full: Config = replace(fill(config, PRESET_FIELDS), decoder_norm_eps=eps)
    return full


def check(config: Config, frames: int, height: int, width: int) -> list[str]:
    """List what keeps this model from being built for clips of frames x height x width."""
    full = resolve(config)
    open_fields = missing(full, PRESET_FIELDS)
    if open_fields:
        return open_fields
    if too_small := size_problems(full, ("tubelet", *PRESET_FIELDS)):
        return too_small
    shape = shape_of(full)
    problems = [
        f"model.{heads_key}={heads}: does not divide model.{dim_key}={dim}"
        for heads_key, heads, dim_key, dim in (
            ("heads", shape.heads, "dim", shape.dim),
            ("decoder_heads", shape.decoder_heads, "decoder_dim", shape.decoder_dim),
        )
        if dim % heads
    ]
    if not 0 <= config.drop_path < 1:
        problems.append(f"model.drop_path={config.drop_path}: a probability from 0 to below 1 is needed")
    return problems + grid_problems(frames, height, width, shape.tubelet, shape.patch_size)


def shape_of(config: Config) -> Shape:
    """Compute the sizes of a resolved configuration."""
    full = resolve(config)
    values = {key: getattr(full, key) for key in PRESET_FIELDS}
    return Shape(tubelet=full.tubelet, **values)


class Encoder(nn.Module):
    """ViT over the visible cubes only."""

    def __init__(self, config: Config, shape: Shape, grid: Grid) -> None:
        super().__init__()
        self.patch_embed = CubeEmbedding(shape.dim, shape.tubelet, shape.patch_size)
        self.positions = SinCosPositions(grid.tokens, shape.dim)
        self.blocks = build_blocks(config, shape.dim, shape.depth, shape.heads, shape.hidden)
        self.norm = nn.LayerNorm(shape.dim, eps=config.norm_eps)

    def forward(self, cubes: Tensor, index: Tensor, recompute: Recompute = False) -> Tensor:
        """Encode cubes [B, n, cube] that lie at tokens `index` [B, n] as features [B, n, C]."""
        tokens = self.patch_embed(cubes)
        tokens = tokens + self.positions(index).to(tokens.dtype)
        return self.norm(run_blocks(self.blocks, tokens, recompute))


class Decoder(nn.Module):
    """Narrow ViT that predicts the pixels of mask tokens."""

    def __init__(self, config: Config, shape: Shape, grid: Grid) -> None:
        super().__init__()
        self.positions = SinCosPositions(grid.tokens, shape.decoder_dim)
        hidden = int(shape.decoder_dim * shape.mlp_ratio)
        self.blocks = build_blocks(config, shape.decoder_dim, shape.decoder_depth, shape.decoder_heads, hidden)
        self.norm = nn.LayerNorm(shape.decoder_dim, eps=config.decoder_norm_eps or config.norm_eps)
        self.head = Linear(shape.decoder_dim, shape.cube)

    def forward(self, tokens: Tensor, predicted: int, recompute: Recompute = False) -> Tensor:
        """Decode tokens [B, n, D] with positions to pixels [B, predicted, cube] of the last `predicted` of them."""
        tokens = run_blocks(self.blocks, tokens, recompute)
        # Norm and head of the asked tokens alone, as officially: the visible ones' pixels would be thrown away.
        return self.head(self.norm(tokens[:, -predicted:]))


class VideoMAE(nn.Module):
    """Masked autoencoder: encodes visible cubes, predicts cubes at the asked tokens.

    Args:
        config: model section of the recipe.
        frames, height, width: size of a clip, pixels.
        activation_checkpointing: recompute each block in the backward pass, all of it or in part; see `run_blocks`.

    Raises:
        RecipeError: the configuration can't be built for this clip size.
    """

    def __init__(
        self, config: Config, frames: int, height: int, width: int, activation_checkpointing: Recompute = False
    ) -> None:
        super().__init__()
        problems = check(config, frames, height, width)
        if problems:
            raise RecipeError(problems)
        self.config = resolve(config)
        self.shape = shape_of(config)
        self.grid = grid_of(frames, height, width, self.shape.tubelet, self.shape.patch_size)
        self.activation_checkpointing = activation_checkpointing
        self.encoder = Encoder(self.config, self.shape, self.grid)
        self.decoder = Decoder(self.config, self.shape, self.grid)
        # PyTorch's own first weights, as officially: only layers inside encoder and decoder draw Xavier ones.
        self.encoder_to_decoder = nn.Linear(self.shape.dim, self.shape.decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.shape.decoder_dim))
        # Cut at one deviation, as the official trunc_normal_ does; torch's own limits are an absolute 2.
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, cubes: Tensor, visible: Tensor, targets: Tensor) -> Tensor:
        """Predict cubes.

        Args:
            cubes: normalised pixels of the visible cubes, [B, Nv, cube]; cast to the weights' type here.
            visible: their tokens, int64 [B, Nv], ascending.
            targets: tokens to predict, int64 [B, M].

        Returns:
            Predictions [B, M, cube] in the weights' type, element order as in `cut_cubes`.
        """
        recompute = self.activation_checkpointing
        encoded = self.encoder(cubes.to(self.mask_token.dtype), visible, recompute)
        seen = self.encoder_to_decoder(encoded)
        seen = seen + self.decoder.positions(visible).to(seen.dtype)
        # The table is cast first: a sum with float32 is float32, and so would be all tokens of the decoder.
        asked = self.mask_token + self.decoder.positions(targets).to(seen.dtype)
        return self.decoder(torch.cat((seen, asked), dim=1), targets.shape[1], recompute)


class VideoMAEArchitecture(MaskedAutoencoder):
    """VideoMAE as a recipe describes it."""

    videomae_layouts = True
    encodes = True

    @staticmethod
    def resolve(config: Config) -> Config:
        return resolve(config)

    def problems(self) -> list[str]:
        return check(self.config, *self.input.size)

    def build(self, activation_checkpointing: Recompute = False) -> VideoMAE:
        frames, height, width = self.input.size
        return VideoMAE(self.config, frames, height, width, activation_checkpointing)

    @property
    def grid(self) -> Grid:
        shape, (frames, height, width) = shape_of(self.config), self.input.size
        return grid_of(frames, height, width, shape.tubelet, shape.patch_size)

    def cost(self, visible: int, targets: int) -> dict[str, float]:
        return cost(self.config, self.grid, visible, targets)


ARCHITECTURE = VideoMAEArchitecture


def cost(config: Config, grid: Grid, visible: int, targets: int) -> dict[str, float]:
    """Count multiply-accumulates of one clip's forward pass, by part, as publications do.

    Published numbers embed all cubes; the last part, `skipped: ...`, is what this code saves by embedding visible ones.
    Element-wise work (norms, GELU, softmax) is not counted.
    """
    shape = shape_of(config)
    embedding = shape.cube * shape.dim
    encoder = shape.depth * block_macs(visible, shape.dim, shape.mlp_ratio)
    decoder = shape.decoder_depth * block_macs(visible + targets, shape.decoder_dim, shape.mlp_ratio)
    return {
        "cube embedding": float(visible * embedding),
        "encoder": float(encoder),
        "encoder to decoder": float(visible * shape.dim * shape.decoder_dim),
        "decoder": float(decoder),
        "prediction head": float(targets * shape.decoder_dim * shape.cube),
        "skipped: embedding of hidden cubes": float((grid.tokens - visible) * embedding),
    }
