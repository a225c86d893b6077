"""MoCo v3's ViT for pictures: fixed sine and cosine positions, a patch embedding that stays as it was drawn.

Chen, Xie and He, "An Empirical Study of Training Self-Supervised Vision Transformers", 2021: a trained patch embedding
makes contrastive training of ViTs unstable. SNCLR's encoder (systems/snclr.md, section 2). Parameters have the names of
`image_vit`, which takes its weights over for fine-tuning.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models import image_vit
from pretrain.models.dropout import drop_path_rates
from pretrain.models.image_vit import ImageViT, ImageViTArchitecture, PatchEmbedding
from pretrain.models.recompute import Recompute
from pretrain.models.vit import Block

#: Deviation of the class token's first values.
CLASS_STD = 1e-6


@dataclass
class Config(image_vit.Config):
    """An image ViT as MoCo v3 trains it; by default its ViT-S, with 12 heads of 32 channels."""

    name: str = "moco_vit"
    """architecture: pretrain/models/<name>.py"""
    heads: int = 12
    """attention heads"""
    classes: int = 0
    """outputs of the head; 0: no head"""
    freeze_patches: bool = True
    """keep the patch embedding as it was drawn"""


def code_problems(config: Config) -> list[str]:
    """List what keeps the position code from being made."""
    if config.dim > 0 and config.dim % 4:
        return [f"model.dim={config.dim}: no multiple of 4, sines and cosines of rows and columns"]
    return []


def grid_code(side: int, dim: int) -> Tensor:
    """Compute the position code of a class token, which is 0, and a square grid, float32 [1, 1 + side^2, dim].

    The code of row r and column c is [sin(r w), cos(r w), sin(c w), cos(c w)] with w_k = 10000^(-4k/dim). In NumPy,
    since `deepspeed.zero.Init` rounds what torch makes.
    """
    omega = 10000.0 ** -(np.arange(dim // 4) / (dim // 4))
    rows, columns = (axis.reshape(-1, 1) * omega for axis in np.meshgrid(*[np.arange(side)] * 2, indexing="ij"))
    code = np.concatenate([np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), code]).astype(np.float32))[None]


def joint_uniform(weight: Tensor) -> Tensor:
    """Fill a joint projection [3C, C] as three Xavier-uniform ones."""
    outputs, inputs = weight.shape
    limit = math.sqrt(6 / (outputs / 3 + inputs))
    return nn.init.uniform_(weight, -limit, limit)


class FixedPatchEmbedding(PatchEmbedding):
    """Convolution over patches, uniform as Xavier's of a linear layer on a patch, bias 0."""

    def __init__(self, dim: int, patch: int, frozen: bool) -> None:
        super().__init__(dim, patch)
        limit = math.sqrt(6 / (3 * patch**2 + dim))
        nn.init.uniform_(self.proj.weight, -limit, limit)
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)
        self.requires_grad_(not frozen)


class MocoViT(ImageViT):
    """An image ViT that begins as MoCo v3's does.

    Raises:
        RecipeError: the configuration can't be built.
    """

    options: Config

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        if problems := code_problems(options):
            raise RecipeError(problems)
        super().__init__(options, activation_checkpointing)
        self.patch_embed = FixedPatchEmbedding(options.dim, options.patch_size, options.freeze_patches)
        self.cls_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, options.dim), std=CLASS_STD))
        # A parameter without gradient and no buffer: released files hold it, and fine-tuning may train it.
        code = grid_code(self.grid.height, options.dim).to(torch.get_default_device())
        self.pos_embed = nn.Parameter(code, requires_grad=False)
        rates = drop_path_rates(options.drop_path, options.depth)
        self.blocks = nn.ModuleList(_block(options, rate) for rate in rates)


def _block(options: Config, drop_path: float) -> Block:
    hidden = int(options.dim * options.mlp_ratio)
    return Block(
        options.dim,
        options.heads,
        hidden,
        options.norm_eps,
        drop_path=drop_path,
        bias="all",
        joint_init=joint_uniform,
    )


class MocoViTArchitecture(ImageViTArchitecture):
    """MoCo v3's ViT as a recipe describes it; its input is clips of one frame."""

    def problems(self) -> list[str]:
        return super().problems() + code_problems(self.config)

    def build(self, activation_checkpointing: Recompute = False) -> MocoViT:
        return MocoViT(self.config, activation_checkpointing)


ARCHITECTURE = MocoViTArchitecture
