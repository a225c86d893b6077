"""TVTSv2: CLIP's towers, the image tower with divided space-time attention, and a head that puts texts in order.

Source: systems/tvtsv2.md, sections 2, 3 and 4; TencentARC/TVTS @ 290a63e, folder v2. Names are those of models/clip.py:

    visual.embed  visual.times.table  visual.norm_pre  visual.blocks.N.{norm3,timeattn,norm1,attn,norm2,mlp}
    visual.norm  visual.head          text.*           sorting.{type_embed,blocks.N,norm,head}

Shapes: B clips, T frames, P patches of a frame, n of them kept, K texts of a clip, C channels, E of the shared space.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError
from pretrain.models import clip
from pretrain.models.base import Architecture, Cost
from pretrain.models.clip import ACTIVATIONS, TextTower, TowerFeatures, VisualTower, normal
from pretrain.models.encoder import block_macs, mlp_macs, size_problems
from pretrain.models.linear import Linear
from pretrain.models.recompute import Recompute, run_blocks
from pretrain.models.vit import Attention, Block

#: Epsilon of the sorting head's norms.
SORT_EPS = 1e-6


@dataclass
class Config(clip.Config):
    """CLIP's towers for clips: a size and what departs from it."""

    name: str = "tvtsv2"
    """architecture: pretrain/models/<name>.py"""
    frames: int = 12
    """rows of the temporal table; shorter clips take its first rows, for longer ones it is stretched"""
    tokens: Literal["normed", "plain"] | None = None
    """what the sorting head sees: normed: all tokens behind the last norm, class token too; plain: patches without
    that norm; null: normed, for H/14 plain"""
    segments: int = 4
    """texts that the sorting head puts in order, K"""
    sort_depth: int = 2
    """blocks of the sorting head"""
    sort_heads: int | None = None
    """attention heads of the sorting head; null: one for each 64 channels of the shared space"""


def resolved(config: Config) -> Any:
    """Fill every null of a configuration in from its size."""
    full: Any = clip.resolve(config)
    tokens = full.tokens or ("plain" if full.size == "H/14" else "normed")
    return replace(full, tokens=tokens, sort_heads=full.sort_heads or max(1, (full.embedding or 0) // 64))


def tower_problems(config: Config) -> list[str]:
    """List what keeps the towers and the sorting head from being built."""
    if found := clip.check(config):
        return found
    full = resolved(config)
    if found := size_problems(full, ("frames", "segments", "sort_depth", "sort_heads")):
        return found
    if full.embedding % full.sort_heads:
        found.append(f"model.sort_heads={full.sort_heads}: does not divide model.embedding={full.embedding}")
    return found


class TimeTable(nn.Module):
    """Learned positions of frames, the same for all patches of one."""

    def __init__(self, frames: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(torch.empty(frames, dim), dim**-0.5))

    def forward(self, patches: Tensor) -> Tensor:
        """Add the table to patches [B, T, P, C]; for more frames than it has rows it is stretched, linearly."""
        frames = patches.shape[1]
        table: Tensor = self.table
        if frames > len(table):
            # As positions of space are: cell centres aligned, so that the first and last row keep their ends.
            lines = F.interpolate(table.t()[None], size=frames, mode="linear", align_corners=False)
            table = lines[0].t()
        return patches + table[:frames, None]


def divided_attention(attention: Attention, x: Tensor, frames: int, over: Literal["time", "space"]) -> Tensor:
    """Attend within groups of tokens [B, 1+T*n, C], frame after frame: one patch at all times, or one frame's patches.

    Each group also sees the class token, which itself sees all tokens.
    """
    query, key, value = attention.project(x)
    first = F.scaled_dot_product_attention(query[:, :, :1], key, value)

    def grouped(tokens: Tensor, with_class: bool) -> Tensor:
        """[B, h, 1+T*n, d] to [B*groups, h, members, d]."""
        groups = tokens[:, :, 1:].unflatten(2, (frames, -1))
        groups = groups.permute(0, 3, 1, 2, 4) if over == "time" else groups.permute(0, 2, 1, 3, 4)
        if with_class:
            shared = tokens[:, None, :, :1].expand(-1, groups.shape[1], -1, -1, -1)
            groups = torch.cat((shared, groups), dim=3)
        return groups.flatten(0, 1)

    mixed = F.scaled_dot_product_attention(grouped(query, False), grouped(key, True), grouped(value, True))
    mixed = mixed.unflatten(0, (len(x), -1))
    mixed = mixed.permute(0, 2, 3, 1, 4) if over == "time" else mixed.permute(0, 2, 1, 3, 4)
    whole = torch.cat((first, mixed.flatten(2, 3)), dim=2)
    # The module itself is called, and not its weights read: stage 3 gathers them only there.
    return attention.dropout(attention.proj(whole.transpose(1, 2).flatten(2)))


class DividedBlock(Block):
    """CLIP's block with attention over time in front of that over space.

    The residual pattern is Frozen in Time's: what attention over time has changed enters attention over space, whose
    output is added to the block's input.
    """

    def __init__(self, full: Any) -> None:
        dim, init = full.dim, _fan_in
        super().__init__(dim, full.heads, int(dim * full.mlp_ratio), full.norm_eps, bias="all", init=init,
                         activation=ACTIVATIONS[full.activation])  # fmt: skip
        self.norm3 = nn.LayerNorm(dim, eps=full.norm_eps)
        self.timeattn = Attention(dim, full.heads, bias="all", init=_idle)

    def forward(self, x: Tensor, reduction: Any = None, frames: int = 1) -> Tensor:
        """Transform tokens [B, 1+T*n, C].

        Raises:
            RecipeError: tokens are to be dropped, which would leave groups of different sizes.
        """
        if reduction is not None:
            raise RecipeError("divided attention groups the same patches in all frames: it can't drop some of them")
        timed = x + divided_attention(self.timeattn, self.norm3(x), frames, "time")
        return self._transform(self._attend(x, divided_attention(self.attn, self.norm1(timed), frames, "space")))


class VideoTower(VisualTower):
    """CLIP's image tower for clips; of one frame and without the table's row it is that image tower.

    Args:
        config: sizes; the text tower's are not looked at.
        activation_checkpointing: recompute each block in the backward pass.
    """

    def __init__(self, config: Config, activation_checkpointing: Recompute = False) -> None:
        if problems := tower_problems(config):
            raise RecipeError(problems)
        full = resolved(config)
        super().__init__(config, bool(activation_checkpointing), lambda index: DividedBlock(full))
        self.activation_checkpointing = activation_checkpointing
        self.times = TimeTable(full.frames, full.dim)
        self.sorts_normed = full.tokens == "normed"

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embed clips, see `forward_features`: [B, E], not normalised."""
        return self.forward_head(self.forward_features(images, visible=visible).tokens)

    def forward_features(
        self, images: Tensor, layers: Sequence[int] = (), visible: Tensor | None = None
    ) -> TowerFeatures:
        """Compute tokens [B, 1+T*n, C] behind the last block, those of the first frame behind the class token.

        Args:
            images: normalised clips [B, T, H, W, 3], or images [B, 3, H, W].
            layers: blocks whose tokens are asked for as well; negative ones count from the end.
            visible: patches that are kept, int64 [B, n], the same in all frames; None: all.

        Raises:
            RecipeError: there is no such block, or a prompt is attached, which belongs to no frame.
        """
        if self.embeddings is not None or self.reorganisation is not None:
            raise RecipeError("divided attention takes neither prompts nor fewer tokens from block to block")
        clips = images.permute(0, 2, 3, 1)[:, None] if images.dim() == 4 else images
        batch, frames = clips.shape[:2]
        tokens = self.embed(clips.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, (batch, frames))
        # The class token is the same in all frames: it has no time.
        first, patches = tokens[:, 0, :1], self.times(tokens[:, :, 1:])
        if visible is not None:
            index = visible[:, None, :, None].expand(-1, frames, -1, patches.shape[-1])
            patches = patches.gather(2, index)
        x = self.norm_pre(torch.cat((first, patches.flatten(1, 2)), dim=1))
        wanted = [index % len(self.blocks) for index in layers]
        kept: dict[int, Tensor] = {}
        for place, block in enumerate(self.blocks):
            x = run_blocks([partial(block, frames=frames)], x, self.activation_checkpointing)
            if place in wanted:
                kept[place] = x
        return TowerFeatures(x, tuple(kept[index] for index in wanted))

    def sorted_by(self, tokens: Tensor) -> Tensor:
        """Give what the sorting head sees of tokens behind the last block: [B, 1+T*n, E], or patches alone."""
        return self.head(self.norm(tokens) if self.sorts_normed else tokens[:, 1:])


class SortingHead(nn.Module):
    """Tells the place in time of each of K texts of a clip by looking at the clip's tokens.

    Texts have no position code, so logits are permuted as the texts are. Linear weights begin as PyTorch's (the
    official own initialisation is never called), but with zero biases; `type_embed` begins at zero.
    """

    def __init__(self, full: Any) -> None:
        super().__init__()
        dim = full.embedding
        self.type_embed = nn.Parameter(torch.zeros(1, 2, dim))
        self.blocks = nn.ModuleList(
            Block(dim, full.sort_heads, 4 * dim, SORT_EPS, bias="all", init=_torch_linear)
            for _ in range(full.sort_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=SORT_EPS)
        self.head = Linear(dim, full.segments, init=_torch_linear)

    def forward(self, video: Tensor, texts: Tensor) -> Tensor:
        """Give logits [B, K, K] of each text's place, of a clip's tokens [B, N, E] and its texts [B, K, E]."""
        kinds = self.type_embed.unbind(1)
        x = torch.cat((video + kinds[0][:, None], texts + kinds[1][:, None]), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, video.shape[1] :]))


class TVTSv2(nn.Module):
    """Both towers and the sorting head.

    Raises:
        RecipeError: the configuration can't be built.
    """

    def __init__(self, config: Config, activation_checkpointing: Recompute = False) -> None:
        super().__init__()
        self.config = config
        self.visual = VideoTower(config, activation_checkpointing)
        self.text = TextTower(config, activation_checkpointing)
        self.sorting = SortingHead(resolved(config))


class TVTSv2Architecture(Architecture):
    """TVTSv2 as a recipe describes it."""

    config: Config

    @staticmethod
    def resolve(config: Any) -> Any:
        """Fill in what the configuration leaves to its size."""
        return resolved(config)

    def problems(self) -> list[str]:
        found = tower_problems(self.config)
        if found:
            return found
        patch = resolved(self.config).patch_size
        return [
            f"input.{name}: found {size}, allowed: a multiple of model.patch_size={patch}"
            for name, size in zip(("height", "width"), self.input.size[1:], strict=True)
            if size % patch
        ]

    def build(self, activation_checkpointing: Recompute = False) -> TVTSv2:
        return TVTSv2(self.config, activation_checkpointing)

    def cost(self, kept: int | None = None, texts: int = 1) -> Cost:
        """Count the work of a clip with its texts.

        Args:
            kept: patches of a frame that are kept; None: all.
            texts: texts of the clip; with more than one they are sorted as well.
        """
        full = resolved(self.config)
        macs = video_macs(full, self.input.size, kept)
        blocks = full.text_depth * block_macs(full.context, full.text_dim, full.mlp_ratio)
        macs["text tower"] = float(texts * (blocks + full.text_dim * full.embedding))
        tokens = self.input.size[0] * (kept or patches_of(full, self.input.size))
        if texts > 1:
            macs["sorting head"] = float(full.sort_depth * block_macs(tokens + texts, full.embedding, 4))
        return Cost(macs, {"all": tokens})


ARCHITECTURE = TVTSv2Architecture


def patches_of(full: Any, size: tuple[int, int, int]) -> int:
    """Count the patches of a frame, P."""
    return (size[1] // full.patch_size) * (size[2] // full.patch_size)


def video_macs(full: Any, size: tuple[int, int, int], kept: int | None = None) -> dict[str, float]:
    """Count the multiply-accumulates of the video tower for a clip of T, H, W, by part."""
    frames, patches = size[0], patches_of(full, size)
    n, dim = kept or patches, full.dim
    tokens = 1 + frames * n
    projections = 2 * 4 * tokens * dim * dim
    # Keys and values: all for the class token's query, its group and the class for each other one.
    pairs = 2 * tokens + frames * n * (frames + 1) + frames * n * (n + 1)
    blocks = full.depth * (projections + 2 * pairs * dim + mlp_macs(tokens, dim, int(dim * full.mlp_ratio)))
    return {
        "video tower: patches": float(frames * patches * 3 * full.patch_size**2 * dim),
        "video tower: blocks": float(blocks),
        "video tower: projection": float(tokens * dim * full.embedding),
    }


def _fan_in(weight: Tensor) -> Tensor:
    return normal(weight, weight.shape[1] ** -0.5)


def _idle(weight: Tensor) -> Tensor:
    """Begin attention over time so that it adds nothing: values are 0, and the projection is all ones."""
    return nn.init.zeros_(weight) if weight.shape[0] != weight.shape[1] else nn.init.ones_(weight)


def _torch_linear(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, a=5**0.5)
