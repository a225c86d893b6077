"""Plain ViT for images with a class token and learned positions: DeiT, MAE and timm checkpoints, their parameter names.

It is what EViT and the image half of AdaptFormer were published on (systems/evit.md section 2, adaptformer.md 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.backbone import Backbone, build_head, layer_id
from pretrain.models.base import Classifier, Cost
from pretrain.models.cubes import Grid, grid_of, grid_problems
from pretrain.models.dropout import drop_path_rates
from pretrain.models.encoder import attention_macs, mlp_macs, size_problems
from pretrain.models.keep_rates import Reorganisation, keep_rates, rate_problems, token_counts
from pretrain.models.linear import truncated_normal
from pretrain.models.pixels import single_pictures
from pretrain.models.positions import stretch_class_table
from pretrain.models.recompute import Recompute
from pretrain.models.token_reorganisation import Tokens
from pretrain.models.vit import Block


@dataclass
class Config:
    """An image ViT."""

    name: str = "image_vit"
    """architecture: pretrain/models/<name>.py"""
    image_size: int = 224
    """side of the images that the position table is for, pixels"""
    patch_size: int = 16
    """side of a patch, pixels"""
    dim: int = 384
    """channels"""
    depth: int = 12
    """blocks"""
    heads: int = 6
    """attention heads"""
    mlp_ratio: float = 4.0
    """hidden channels of an MLP = int(channels x mlp_ratio)"""
    classes: int = 1000
    """outputs of the head; 0: no head"""
    pooling: Literal["class", "mean"] = "class"
    """class: the class token behind norm; mean: of the other tokens, then fc_norm"""
    head: Literal["linear", "batch_norm"] = "linear"
    """linear layer, or a parameter-free batch norm in front of it (AdaptFormer)"""
    drop_path: float = 0.0
    """stochastic depth rate of the last block, rising linearly from 0"""
    norm_eps: float = 1e-6
    """epsilon of every layer norm"""
    tokens: Reorganisation = field(default_factory=Reorganisation)
    """token reorganisation (EViT): fewer tokens on the way"""


def check(config: Config) -> list[str]:
    """List what keeps this model from being built."""
    if too_small := size_problems(config, ("image_size", "patch_size", "dim", "depth", "heads", "mlp_ratio")):
        return too_small
    found = []
    if config.dim % config.heads:
        found.append(f"model.heads={config.heads}: does not divide model.dim={config.dim}")
    if config.image_size % config.patch_size:
        found.append(f"model.image_size={config.image_size}: no multiple of model.patch_size={config.patch_size}")
    if config.classes < 0:
        found.append(f"model.classes={config.classes}: 0 (no head) or more is needed")
    if not 0 <= config.drop_path < 1:
        found.append(f"model.drop_path={config.drop_path}: a probability from 0 to below 1 is needed")
    found += [f"model.tokens: {problem}" for problem in rate_problems(config.tokens, config.depth)]
    # These two are of clips, whose tokens have a time, or for models without a class token.
    for name, video in (("score", config.tokens.score != "auto"), ("per_frame", config.tokens.per_frame)):
        if video:
            value = getattr(config.tokens, name)
            found.append(f"model.tokens.{name}={value}: for videos alone; a picture's class token scores the others")
    return found


class PatchEmbedding(nn.Module):
    """Convolution over patches, PyTorch's init."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] as tokens [B, N, C], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ImageViT(Backbone):
    """ViT with a class token; takes images of any size that patches fit, stretching the position table.

    Raises:
        RecipeError: the configuration can't be built.
    """

    norm: nn.LayerNorm | None
    fc_norm: nn.LayerNorm | None

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        if problems := check(options):
            raise RecipeError(problems)
        super().__init__(options.dim, 1, activation_checkpointing)
        self.options = options
        side = options.image_size // options.patch_size
        self.grid = Grid(1, side, side)
        self.patch_embed = PatchEmbedding(options.dim, options.patch_size)
        self.cls_token = nn.Parameter(truncated_normal(torch.empty(1, 1, options.dim)))
        self.pos_embed = nn.Parameter(truncated_normal(torch.empty(1, 1 + self.grid.tokens, options.dim)))
        self.blocks = nn.ModuleList(_block(options, rate) for rate in drop_path_rates(options.drop_path, options.depth))
        of_class = options.pooling == "class"
        # One of the two exists, as in timm and MAE: the strict loader would miss weights for the other.
        self.norm = nn.LayerNorm(options.dim, eps=options.norm_eps) if of_class else None
        self.fc_norm = None if of_class else nn.LayerNorm(options.dim, eps=options.norm_eps)
        self.head = build_head(options.head, options.dim, options.classes, scale=1.0)
        self.reorganise(options.tokens)

    def forward(
        self,
        images: Tensor,
        keep_rate: float | Sequence[float] | None = None,
        counts: int | Sequence[int | None] | None = None,
    ) -> Tensor:
        """Compute logits [B, classes] of normalised images [B, 3, H, W]."""
        return self.forward_head(self.forward_features(images, keep_rate=keep_rate, counts=counts))

    def forward_features(
        self,
        images: Tensor,
        pooled: bool = True,
        keep_rate: float | Sequence[float] | None = None,
        counts: int | Sequence[int | None] | None = None,
    ) -> Tensor:
        """Compute features [B, C], or with `pooled` false those of all tokens, the class token first, [B, 1+N, C]."""
        tokens = self.encode(images, keep_rate, counts)
        return self.pool(tokens) if pooled else self.normed(tokens.x)

    def encode(
        self,
        images: Tensor,
        keep_rate: float | Sequence[float] | None = None,
        counts: int | Sequence[int | None] | None = None,
    ) -> Tokens:
        """Compute the tokens behind the last block, with their origins where some were dropped."""
        return self.run(self.embed(images), 1, keep_rate, counts)

    def embed(self, images: Tensor) -> Tensor:
        """Embed images as tokens [B, 1+N, C] with positions, as they enter the first block.

        Images are [B, 3, H, W], or clips of one frame [B, 1, H, W, 3] as samples have them.

        Raises:
            RecipeError: clips of several frames, or patches that don't fit.
        """
        images = single_pictures(images, self.options.name)
        patch = self.options.patch_size
        height, width = images.shape[2:]
        if height % patch or width % patch:
            raise RecipeError(f"images of {height}x{width}: patches of {patch} pixels don't fit")
        # Pixels arrive as float32; a convolution takes its weights' type alone.
        tokens = self.patch_embed(images.to(self.pos_embed.dtype))
        # Not len(): a number would make the count of pictures a constant of an exported graph.
        tokens = torch.cat((self.cls_token.expand(images.shape[0], -1, -1), tokens), dim=1)
        return tokens + stretch_class_table(self.pos_embed[0], self.grid, Grid(1, height // patch, width // patch))

    def pool(self, tokens: Tokens) -> Tensor:
        """Pool to features [B, C]: the class token behind `norm`, or `fc_norm` of the other tokens' mean."""
        if self.fc_norm is None:
            return self.normed(tokens.x)[:, 0]
        return self.fc_norm(self.mean_tokens(tokens))

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of features [B, C]."""
        logits: Tensor = self.head(features)
        return logits

    def normed(self, x: Tensor) -> Tensor:
        """Apply the norm behind the last block to tokens, where the model has one there."""
        return x if self.norm is None else self.norm(x)


def _block(options: Config, drop_path: float) -> Block:
    hidden = int(options.dim * options.mlp_ratio)
    return Block(
        options.dim,
        options.heads,
        hidden,
        options.norm_eps,
        drop_path=drop_path,
        bias="all",
        init=truncated_normal,
    )


class ImageViTArchitecture(Classifier):
    """An image ViT as a recipe describes it; its input is clips of one frame."""

    def problems(self) -> list[str]:
        frames, height, width = self.input.size
        found = check(self.config)
        if self.config.patch_size > 0:  # else `check` has told
            found += grid_problems(frames, height, width, 1, self.config.patch_size)
        if frames != 1:
            found.append(f"input.frames={frames}: image_vit takes single pictures; set input.frames=1")
        return found

    def build(self, activation_checkpointing: Recompute = False) -> ImageViT:
        return ImageViT(self.config, activation_checkpointing)

    def cost(self) -> Cost:
        options, dim = self.config, self.config.dim
        rates = keep_rates(options.tokens, options.depth)
        counts = [1 + count for count in token_counts(self._tokens, rates, options.tokens.fuse)]
        # Tokens are dropped between attention and MLP, so a dropping block's attention still sees all that enter.
        entering = [1 + self._tokens, *counts[:-1]]
        hidden = int(dim * options.mlp_ratio)
        return Cost(
            {
                "patch embedding": float(self._tokens * 3 * options.patch_size**2 * dim),
                "attention": float(sum(attention_macs(count, dim) for count in entering)),
                "MLP": float(sum(mlp_macs(count, dim, hidden) for count in counts)),
                "head": float(dim * options.classes),
            },
            {"all": 1 + self._tokens},
        )

    def layer_of(self, name: str) -> tuple[int, int]:
        return layer_id(name, self.config.depth), self.config.depth + 1

    def token_grid(self, frames: int, height: int, width: int) -> Grid:
        return grid_of(frames, height, width, 1, self.config.patch_size)

    @property
    def _tokens(self) -> int:
        _, height, width = self.input.size
        return (height // self.config.patch_size) * (width // self.config.patch_size)


ARCHITECTURE = ImageViTArchitecture
