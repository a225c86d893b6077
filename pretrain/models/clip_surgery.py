"""CLIP surgery on weights: patch tokens of a CLIP's image tower that mean what stands on the patch.

Li, Wang, Duan, Li: CLIP Surgery, arXiv 2304.05653, as TagAlign's code does it (systems/tagalign.md, section 2.1):
beside the ordinary path of the last blocks runs another one, to which each of them adds attention of values to
values, taken from the ordinary path, and no MLP. Nothing is replaced in the tower: both paths are put together of its
blocks' parts, so weights of any layout do. Shapes: B images, N patches, C channels, E of the space that images and
texts share.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.clip import Config, VisualTower
from pretrain.models.clip_weights import load_clip
from pretrain.models.cubes import Grid
from pretrain.models.weights import LoadReport


class SurgeryTower(nn.Module):
    """CLIP's image tower, asked for its patches.

    Args:
        config: sizes of the CLIP.
        blocks: last blocks that run on two paths; 0: patches as CLIP itself has them.

    Raises:
        RecipeError: the tower has fewer blocks.
    """

    def __init__(self, config: Config, blocks: int = 6) -> None:
        super().__init__()
        self.tower: Any = VisualTower(config)
        if not 0 <= blocks <= len(self.tower.blocks):
            raise RecipeError(f"surgery on {blocks} blocks: the image tower has {len(self.tower.blocks)}")
        self.ordinary = len(self.tower.blocks) - blocks

    def grid(self, height: int, width: int) -> Grid:
        """Tell where the patches of an image lie; pixels that fill no patch are left out at the right and below."""
        patch = self.tower.embed.patch
        return Grid(1, height // patch, width // patch)

    def forward(self, images: Tensor, class_token: bool = True) -> Tensor:
        """Compute tokens behind the last block, before norm and projection.

        Args:
            images: normalised, [B, 3, H, W], at least a patch high and wide.
            class_token: false leaves it out, and with it most of the last block.

        Returns:
            [B, 1 + N, C], the class token of the ordinary path first; or the patches alone, [B, N, C], row by row.
        """
        tower, grid = self.tower, self.grid(*images.shape[2:])
        patch = tower.embed.patch
        if not grid.tokens:
            raise RecipeError(f"images of {images.shape[2]}x{images.shape[3]}: smaller than a patch of {patch} pixels")
        x = tower.norm_pre(tower.embed(images[..., : grid.height * patch, : grid.width * patch]))
        for block in tower.blocks[: self.ordinary]:
            x = block(x)
        patches, last = x, len(tower.blocks) - 1
        for number, block in enumerate(tower.blocks[self.ordinary :], self.ordinary):
            query, key, value = block.attn.project(block.norm1(x))
            patches = patches + block.attn.mix(value, value, value)
            if number == last and not class_token:
                break
            x = x + block.attn.mix(query, key, value)
            x = x + block.mlp(block.norm2(x))
        if self.ordinary > last:
            patches = x
        patches = patches[:, 1:]
        return torch.cat((x[:, :1], patches), dim=1) if class_token else patches

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Apply CLIP's own norm and projection to tokens [..., C]: [..., E], not normalised."""
        embeddings: Tensor = self.tower.head(self.tower.norm(tokens.to(self.tower.norm.weight.dtype)))
        return embeddings


def load_surgery(tower: SurgeryTower, place: str) -> LoadReport:
    """Copy CLIP weights in any known layout into the tower, strictly; see `load_clip`."""
    return load_clip(tower.tower, place)
