"""Space-time ViT with a classifier, as which pre-trained VideoMAE encoders are fine-tuned, official parameter names.

There is no class token: features are the mean over all tokens behind `fc_norm`, or as an option token 0 behind `norm`.
Sizes and details: systems/videomae.md sections 2, 3 and 8, from OpenGVLab/VideoMAEv2 (`modeling_finetune.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.backbone import AddedClass, Backbone, build_head, layer_id
from pretrain.models.base import Classifier, Cost
from pretrain.models.cubes import Grid, cut_cubes, grid_of, grid_problems
from pretrain.models.dropout import dropout_layer
from pretrain.models.encoder import (
    ENCODER_FIELDS,
    EncoderShape,
    attention_macs,
    build_blocks,
    fill,
    missing,
    mlp_macs,
    size_problems,
)
from pretrain.models.keep_rates import Reorganisation, keep_rates, rate_problems, token_counts
from pretrain.models.linear import truncated_normal
from pretrain.models.positions import InterpolatedPositions, SinCosPositions
from pretrain.models.recompute import Recompute
from pretrain.models.token_reorganisation import Tokens
from pretrain.models.vit import CubeEmbedding


@dataclass
class Config:
    """A size, the classifier, regularisation; null means: as the size has it."""

    name: str = "classifier"
    """architecture: pretrain/models/<name>.py"""
    size: Literal["small", "base", "large", "huge", "giant", "custom"] = "base"
    """published size; custom: every field below that is null must be given"""
    patch_size: int | None = None
    """side of a cube, pixels"""
    tubelet: int = 2
    """frames of a cube"""
    dim: int | None = None
    """channels"""
    depth: int | None = None
    """blocks"""
    heads: int | None = None
    """attention heads"""
    mlp_ratio: float | None = None
    """hidden channels of an MLP = int(channels x mlp_ratio)"""
    classes: int = 400
    """outputs of the head; 0: no head, the model gives features"""
    pooling: Literal["mean", "token0", "class"] = "mean"
    """mean: over all tokens, then fc_norm; token0: the first token behind norm, officially (it is no class token);
    class: the class token of tokens.score=added_class, then fc_norm"""
    head: Literal["linear", "batch_norm"] = "linear"
    """linear layer, or a parameter-free batch norm in front of it (AdaptFormer, linear probes)"""
    head_init_scale: float = 0.001
    """factor on the head's initial weight and bias; linear head only"""
    head_dropout: float = 0.0
    """dropout rate in front of the head"""
    dropout: float = 0.0
    """dropout rate behind positions, attention and MLP"""
    attention_dropout: float = 0.0
    """dropout rate on attention weights"""
    drop_path: float = 0.1
    """stochastic depth rate of the last block, rising linearly from 0"""
    cosine_attention: bool = False
    """L2-normalised queries and keys with a learned scale"""
    layer_scale: float = 0.0
    """initial value of the residual branches' learned scale; 0: no such parameters"""
    norm_eps: float = 1e-6
    """epsilon of every layer norm (Hugging Face models: 1e-12)"""
    fc_norm_eps: float | None = None
    """epsilon of fc_norm; null: norm_eps (Hugging Face models: 1e-5)"""
    positions: Literal["rebuild", "interpolate"] = "interpolate"
    """table for another grid than that of pre-training: computed anew (official), or stretched"""
    pretrain_frames: int = 16
    """frames of the clips that the encoder was pre-trained on; used by interpolate"""
    pretrain_height: int = 224
    """height of the clips that the encoder was pre-trained on, pixels; used by interpolate"""
    pretrain_width: int = 224
    """width of the clips that the encoder was pre-trained on, pixels; used by interpolate"""
    tokens: Reorganisation = field(default_factory=Reorganisation)
    """token reorganisation (EViT): fewer tokens on the way"""


def resolve(config: Config) -> Config:
    """Fill every null in from the size."""
    eps = config.norm_eps if config.fc_norm_eps is None else config.fc_norm_eps
    full: Config = replace(fill(config, ENCODER_FIELDS), fc_norm_eps=eps)
    return full


def shape_of(config: Config) -> EncoderShape:
    """Compute the sizes of a configuration."""
    full = resolve(config)
    return EncoderShape(tubelet=full.tubelet, **{key: getattr(full, key) for key in ENCODER_FIELDS})


def check(config: Config, frames: int, height: int, width: int) -> list[str]:
    """List what keeps this model from being built for clips of frames x height x width."""
    full = resolve(config)
    open_fields = missing(full, ENCODER_FIELDS)
    if open_fields:
        return open_fields
    if too_small := size_problems(full, ("tubelet", *ENCODER_FIELDS)):
        return too_small
    shape = shape_of(full)
    problems = [
        f"model.{key}={getattr(config, key)}: a probability from 0 to below 1 is needed"
        for key in ("head_dropout", "dropout", "attention_dropout", "drop_path")
        if not 0 <= getattr(config, key) < 1
    ]
    if shape.dim % shape.heads:
        problems.append(f"model.heads={shape.heads}: does not divide model.dim={shape.dim}")
    if config.classes < 0:
        problems.append(f"model.classes={config.classes}: 0 (no head) or more is needed")
    problems += [f"model.tokens: {problem}" for problem in rate_problems(config.tokens, shape.depth)]
    if config.pooling == "class" and config.tokens.score != "added_class":
        problems.append("model.pooling=class: there is a class token only with model.tokens.score=added_class")
    problems += grid_problems(frames, height, width, shape.tubelet, shape.patch_size)
    if config.positions == "interpolate":
        pretrain = (config.pretrain_frames, config.pretrain_height, config.pretrain_width)
        problems += [
            f"{problem} (model.pretrain_*)" for problem in grid_problems(*pretrain, shape.tubelet, shape.patch_size)
        ]
    return problems


def varying_problems(config: Config, varies: bool) -> list[str]:
    """List what keeps a model from taking clips of any size."""
    if not varies or config.positions == "interpolate":
        return []
    return [f"model.positions: found {config.positions}, allowed with clips that vary in size: interpolate"]


class VideoClassifier(Backbone):
    """Space-time ViT with a head.

    Args:
        config: model section of the recipe.
        frames, height, width: size of a clip, pixels.
        activation_checkpointing: recompute each block in the backward pass.
        varies: take clips of any size, for which positions are stretched.

    Raises:
        RecipeError: the configuration can't be built for this clip size.
    """

    norm: nn.LayerNorm | None
    fc_norm: nn.LayerNorm | None
    added_class: AddedClass | None

    def __init__(
        self, config: Config, frames: int, height: int, width: int, activation_checkpointing: Recompute = False,
        varies: bool = False,
    ) -> None:  # fmt: skip
        problems = check(config, frames, height, width) + varying_problems(config, varies)
        if problems:
            raise RecipeError(problems)
        full, shape = resolve(config), shape_of(config)
        added = full.tokens.score == "added_class"
        super().__init__(shape.dim, int(added), activation_checkpointing)
        self.config, self.shape, self.varies = full, shape, varies
        self.grid = grid_of(frames, height, width, shape.tubelet, shape.patch_size)
        self.patch_embed = CubeEmbedding(shape.dim, shape.tubelet, shape.patch_size)
        self.positions = _positions(full, shape, self.grid)
        self.register_module("added_class", AddedClass(shape.dim) if added else None)
        self.dropout = dropout_layer(full.dropout)
        self.blocks = build_blocks(
            full, shape.dim, shape.depth, shape.heads, shape.hidden, init=truncated_normal,
            dropout=full.dropout, attention_dropout=full.attention_dropout,
        )  # fmt: skip
        official = full.pooling == "token0"
        # One of the two, as officially: for the other the strict loader would miss weights that no file has.
        self.norm = nn.LayerNorm(shape.dim, eps=full.norm_eps) if official else None
        self.fc_norm = None if official else nn.LayerNorm(shape.dim, eps=full.fc_norm_eps or full.norm_eps)
        self.head_dropout = dropout_layer(full.head_dropout)
        self.head = build_head(full.head, shape.dim, full.classes, full.head_init_scale)
        self.reorganise(full.tokens)

    def forward(self, video: Tensor, keep_rate: float | Sequence[float] | None = None) -> Tensor:
        """Compute logits [B, classes] of clips; see `forward_features`."""
        return self.forward_head(self.forward_features(video, keep_rate=keep_rate))

    def forward_features(
        self, video: Tensor, pooled: bool = True, keep_rate: float | Sequence[float] | None = None
    ) -> Tensor:
        """Compute features of clips.

        Args:
            video: ImageNet-normalised pixels [B, T, H, W, 3] of the size that the model was built for (of any where
                it `varies`); cast to the weights' type here.
            pooled: one vector a clip, [B, C]; else those of all tokens, [B, N, C] in the order (t, y, x), behind
                the last block (and `norm`, where the model has it). Where tokens are dropped, `encode` tells which.
            keep_rate: run-time keep rate, where the model drops tokens.
        """
        tokens = self.encode(video, keep_rate)
        return self.pool(tokens) if pooled else self.normed(tokens.x)[:, self.class_tokens :]

    def encode(
        self,
        video: Tensor,
        keep_rate: float | Sequence[float] | None = None,
        counts: int | Sequence[int | None] | None = None,
    ) -> Tokens:
        """Compute the tokens behind the last block, with their origins where some were dropped."""
        return self.run(self.embed(video), video.shape[1] // self.shape.tubelet, keep_rate, counts)

    def embed(self, video: Tensor) -> Tensor:
        """Embed clips as tokens [B, c+N, C] with positions, as they enter the first block."""
        frames, height, width = video.shape[1:4]
        found, expected = (frames, height, width), self._size()
        # The position table is for one grid: another clip with as many tokens would run and mean other places.
        if found != expected and not self.varies:
            raise RecipeError(f"clips of {found} (frames, height, width) for a model built for {expected}")
        cubes = cut_cubes(video, self.shape.tubelet, self.shape.patch_size)
        tokens = self.patch_embed(cubes.to(self.patch_embed.proj.weight.dtype))
        tokens = tokens + self._table(found).to(tokens.dtype)
        return self.dropout(tokens if self.added_class is None else self.added_class(tokens))

    def pool(self, tokens: Tokens) -> Tensor:
        """Pool to features [B, C]: `fc_norm` of the mean or of the class token, or token 0 behind `norm`."""
        if self.fc_norm is None:
            return self.normed(tokens.x)[:, self.class_tokens]
        return self.fc_norm(tokens.x[:, 0] if self.config.pooling == "class" else self.mean_tokens(tokens))

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of features [B, C]."""
        return self.head(self.head_dropout(features))

    def normed(self, x: Tensor) -> Tensor:
        """Apply the norm behind the last block to tokens, where the model has one there."""
        return x if self.norm is None else self.norm(x)

    def _table(self, size: tuple[int, int, int]) -> Tensor:
        if size == self._size():
            return self.positions.table
        assert isinstance(self.positions, InterpolatedPositions), "checked when it was built"
        return self.positions.table_of(grid_of(*size, self.shape.tubelet, self.shape.patch_size))

    def _size(self) -> tuple[int, int, int]:
        grid, patch = self.grid, self.shape.patch_size
        return grid.time * self.shape.tubelet, grid.height * patch, grid.width * patch


def _positions(config: Config, shape: EncoderShape, grid: Grid) -> SinCosPositions:
    if config.positions == "rebuild":
        return SinCosPositions(grid.tokens, shape.dim)
    pretrain = (config.pretrain_frames, config.pretrain_height, config.pretrain_width)
    return InterpolatedPositions(grid, grid_of(*pretrain, shape.tubelet, shape.patch_size), shape.dim)


class VideoClassifierArchitecture(Classifier):
    """The space-time ViT with a head as a recipe describes it."""

    videomae_layouts = True

    @staticmethod
    def resolve(config: Config) -> Config:
        return resolve(config)

    def problems(self) -> list[str]:
        return check(self.config, *self.input.size) + varying_problems(self.config, self.input.VARIES)

    def build(self, activation_checkpointing: Recompute = False) -> VideoClassifier:
        frames, height, width = self.input.size
        return VideoClassifier(self.config, frames, height, width, activation_checkpointing, self.input.VARIES)

    def token_grid(self, frames: int, height: int, width: int) -> Grid:
        shape = shape_of(self.config)
        return grid_of(frames, height, width, shape.tubelet, shape.patch_size)

    @property
    def grid(self) -> Grid:
        """The token grid of the input."""
        shape, (frames, height, width) = shape_of(self.config), self.input.size
        return grid_of(frames, height, width, shape.tubelet, shape.patch_size)

    def cost(self) -> Cost:
        return Cost(cost(self.config, self.grid), {"all": self.grid.tokens})

    def layer_of(self, name: str) -> tuple[int, int]:
        depth = shape_of(self.config).depth
        return layer_id(name, depth), depth + 1


ARCHITECTURE = VideoClassifierArchitecture


def cost(config: Config, grid: Grid) -> dict[str, float]:
    """Count multiply-accumulates of one clip's forward pass, by part, with the keep rates of the configuration."""
    shape = shape_of(config)
    slices = grid.time if config.tokens.per_frame else 1
    counts = token_counts(grid.tokens, keep_rates(config.tokens, shape.depth), config.tokens.fuse, slices)
    # Tokens are dropped between attention and MLP, so a dropping block's attention still sees all that enter.
    entering = [grid.tokens, *counts[:-1]]
    dim = shape.dim
    attention = sum(attention_macs(count, dim) for count in entering)
    mlp = sum(mlp_macs(count, dim, shape.hidden) for count in counts)
    return {
        "cube embedding": float(grid.tokens * 3 * shape.tubelet * shape.patch_size**2 * dim),
        "attention": float(attention),
        "MLP": float(mlp),
        "head": float(dim * config.classes),
    }
