"""Video Swin Transformer: attention inside windows of a clip, shifted in every second block (Liu et al., 2106.13230).

As it is used under CycleACR (systems/cycleacr.md, 3; alphaction/modeling/backbone/swin_transformer.py of
MCG-NJU/CycleACR, from SwinTransformer/Video-Swin-Transformer), whose names its parameters have. Clips of any size: they
are padded with zeros to whole patches, and inside each block to whole windows; nothing masks that padding, officially.
Shapes: B clips, T x H x W tokens, C channels; n windows of N tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError
from pretrain.models.base import Cost, MapsBackbone, MapsShape, side_problems
from pretrain.models.dropout import drop_path_rates, stochastic_depth
from pretrain.models.linear import JointProjection, Linear, truncated_normal
from pretrain.models.recompute import Recompute, run_blocks
from pretrain.models.swin_windows import (
    Size,
    filled_up,
    fitted,
    from_windows,
    relative_positions,
    strangers,
    to_windows,
)
from pretrain.models.vit import Mlp

#: Frames, height and width of a patch.
PATCH = (2, 4, 4)
#: Channels inside an MLP, in multiples of those outside.
MLP_RATIO = 4
#: Added to the scores of tokens that only a shift has brought into one window.
MASKED = -100.0


@dataclass
class Config:
    """Video Swin Transformers."""

    name: str = "video_swin"
    """architecture: pretrain/models/<name>.py"""
    dim: int = 128
    """channels of the first stage; each further one has twice as many, on maps of half the side"""
    depths: list[int] = field(default_factory=lambda: [2, 2, 18, 2])
    """blocks of each stage"""
    heads: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    """attention heads of each stage"""
    window: tuple[int, int, int] = (8, 7, 7)
    """frames, height and width of a window, in tokens"""
    classes: int = 80
    """actions that the task's head tells apart; the network itself has no head"""
    drop_path: float = 0.0
    """probability that a clip skips a residual branch of the last block; it rises linearly over blocks"""


class VideoPatchEmbedding(nn.Module):
    """Convolution of patches that do not overlap, and a layer norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, video: Tensor) -> Tensor:
        """Embed pixels [B, t, y, x, 3] as tokens [B, T, H, W, C]."""
        pixels = filled_up(video, PATCH).permute(0, 4, 1, 2, 3).to(self.proj.weight.dtype)
        tokens: Tensor = self.norm(self.proj(pixels).permute(0, 2, 3, 4, 1))
        return tokens


class WindowAttention(nn.Module):
    """Attention of the tokens of a window to one another, with a learned bias for each difference of places."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: Size) -> None:
        super().__init__()
        self.heads = heads
        differences = math.prod(2 * side - 1 for side in window)
        self.relative_position_bias_table = nn.Parameter(torch.empty(differences, heads))
        truncated_normal(self.relative_position_bias_table)
        self.qkv = JointProjection(dim, True, truncated_normal)
        self.proj = Linear(dim, dim, init=truncated_normal)
        # Not in checkpoints: it is computed.
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)

    def forward(self, x: Tensor, apart: Tensor | None = None) -> Tensor:
        """Mix tokens of windows [B, n, N, C]; those that are `apart`, bool [n, N, N], don't see each other."""
        batch, windows, count, dim = x.shape
        qkv = self.qkv(x).view(batch, windows, count, 3, self.heads, dim // self.heads).permute(3, 0, 1, 4, 2, 5)
        bias = self._bias(count).to(x.dtype)
        if apart is not None:
            bias = (bias + MASKED * apart[:, None].to(x.dtype)).flatten(0, 1)
        # With a mask windows stand beside heads, so that one copy of it serves all clips of a batch.
        query, key, value = qkv.flatten(1, 2) if apart is None else qkv.flatten(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        mixed = mixed.reshape(batch, windows, self.heads, count, -1).transpose(2, 3).flatten(3)
        projected: Tensor = self.proj(mixed)
        return projected

    def _bias(self, count: int) -> Tensor:
        # Officially the first rows and columns are taken for a window that a small clip has cut, as if it were cut in
        # time alone; released weights were trained so.
        index = self.relative_position_index[:count, :count].flatten()
        return self.relative_position_bias_table[index].view(count, count, -1).permute(2, 0, 1)


class SwinBlock(nn.Module):
    """Pre-norm transformer block whose attention stays inside windows, shifted by half a window or not at all."""

    def __init__(self, dim: int, heads: int, window: Size, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, MLP_RATIO * dim, init=truncated_normal)
        # Two, since draws are by a layer's name: one would leave out both branches of a clip or none.
        self.drop_path1, self.drop_path2 = stochastic_depth(drop_path), stochastic_depth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens [B, T, H, W, C]."""
        x = x + self.drop_path1(self._attended(self.norm1(x)))
        mixed: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return mixed

    def _attended(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[1:4]
        window, shift = fitted((frames, height, width), self.window, self.shifted)
        padded = filled_up(x, window)
        size = (padded.shape[1], padded.shape[2], padded.shape[3])
        if not any(shift):
            mixed = from_windows(self.attn(to_windows(padded, window)), window, size)
            return mixed[:, :frames, :height, :width]
        rolled = padded.roll([-step for step in shift], (1, 2, 3))
        mixed = self.attn(to_windows(rolled, window), strangers(size, window, shift, x.device))
        return from_windows(mixed, window, size).roll(shift, (1, 2, 3))[:, :frames, :height, :width]


class PatchMerging(nn.Module):
    """Each four tokens of a frame, beside and below one another, as one of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, init=truncated_normal)

    def forward(self, x: Tensor) -> Tensor:
        """Merge tokens [B, T, H, W, C] to [B, T, ceil(H/2), ceil(W/2), 2C]."""
        x = filled_up(x, (1, 2, 2))
        # Columns outside, rows inside: the order of the released weights.
        parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(parts, dim=-1)))
        return merged


class SwinStage(nn.Module):
    """Blocks of one width, every second one shifted, and the merging that leads to the next stage."""

    downsample: PatchMerging | None

    def __init__(self, dim: int, heads: int, window: Size, rates: Sequence[float], last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(dim, heads, window, bool(index % 2), rate) for index, rate in enumerate(rates)
        )
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x: Tensor, recompute: Recompute = False) -> Tensor:
        x = run_blocks(self.blocks, x, recompute)
        return x if self.downsample is None else self.downsample(x)


class VideoSwin(nn.Module):
    """Patches, stages and a last norm.

    Args:
        options: model section of the recipe.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        RecipeError: it can't be built.
    """

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        super().__init__()
        if found := problems_of_sizes(options):
            raise RecipeError(found)
        self.activation_checkpointing = activation_checkpointing
        rates = iter(drop_path_rates(options.drop_path, sum(options.depths)))
        self.patch_embed = VideoPatchEmbedding(options.dim)
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(options.depths, options.heads, strict=True)):
            own, last = [next(rates) for _ in range(depth)], stage == len(options.depths) - 1
            self.layers.append(SwinStage(options.dim * 2**stage, heads, options.window, own, last))
        self.norm = nn.LayerNorm(options.dim * 2 ** (len(options.depths) - 1))

    def forward(self, video: Tensor) -> list[Tensor]:
        """Compute the map; see `forward_features`."""
        return self.forward_features(video)

    def forward_features(self, video: Tensor) -> list[Tensor]:
        """Compute the map of the last stage, behind the norm.

        Args:
            video: normalised pixels [B, T, H, W, 3] of any size.

        Returns:
            one map [B, 8 dim, T/2, H/32, W/32] with four stages, sizes rounded up.
        """
        x = self.patch_embed(video)
        for stage in self.layers:
            x = stage(x, self.activation_checkpointing)
        return [self.norm(x).permute(0, 4, 1, 2, 3)]


def problems_of_sizes(options: Config) -> list[str]:
    """List what keeps the network from being built."""
    found = [
        f"model.{name}={value}, allowed: 1 or more" + ("" if name == "dim" else " each")
        for name, value in (("dim", options.dim), ("depths", options.depths), ("heads", options.heads),
                            ("window", list(options.window)))
        if min([value] if isinstance(value, int) else value, default=0) < 1
    ]  # fmt: skip
    if not 0 <= options.drop_path < 1:
        found.append(f"model.drop_path={options.drop_path}, allowed: a probability from 0 to below 1")
    if found:
        return found
    if len(options.heads) != len(options.depths):
        return [f"model.heads={options.heads}, allowed: one number for each of model.depths={options.depths}"]
    return [
        f"model.heads={options.heads}: {heads} do not divide the {options.dim * 2**stage} channels of stage {stage + 1}"
        for stage, heads in enumerate(options.heads)
        if options.dim * 2**stage % heads
    ]


class VideoSwinArchitecture(MapsBackbone):
    """Video Swin as a recipe describes it."""

    def problems(self) -> list[str]:
        small = side_problems(self.input.size, self.config.name, PATCH[1], "a patch")
        return problems_of_sizes(self.config) + small

    def build(self, activation_checkpointing: Recompute = False) -> VideoSwin:
        return VideoSwin(self.config, activation_checkpointing)

    def maps(self) -> MapsShape:
        last = 2 ** (len(self.config.depths) - 1)
        # The published CycleACR pools from maps as if they had stride 16 (systems/cycleacr.md, quirk 12).
        return MapsShape((self.config.dim * last,), (-(-self.input.size[0] // PATCH[0]),), 1 / (PATCH[1] * last))

    def layer_of(self, name: str) -> tuple[int, int]:
        depths, parts = self.config.depths, name.split(".")
        last = sum(depths) + 1
        if parts[0] == "patch_embed":
            return 0, last
        if parts[0] != "layers":
            return last, last
        stage, before = int(parts[1]), sum(depths[: int(parts[1])])
        # A merging belongs to the block before it.
        return before + (int(parts[3]) + 1 if parts[2] == "blocks" else depths[stage]), last

    def cost(self) -> Cost:
        """Count what is multiplied, with the padding that attention computes."""
        first, *_ = grids = list(self._grids())
        macs = {"patch embedding": float(math.prod(first) * 3 * math.prod(PATCH) * self.config.dim)}
        macs |= dict.fromkeys(("attention", "MLP", "merging"), 0.0)
        for stage, (grid, depth) in enumerate(zip(grids, self.config.depths, strict=True)):
            dim = self.config.dim * 2**stage
            window, _ = fitted(grid, self.config.window, False)
            filled = math.prod(whole + -whole % side for whole, side in zip(grid, window, strict=True))
            macs["attention"] += depth * filled * (4 * dim**2 + 2 * math.prod(window) * dim)
            macs["MLP"] += depth * math.prod(grid) * 2 * MLP_RATIO * dim**2
            if stage + 1 < len(grids):
                macs["merging"] += math.prod(grids[stage + 1]) * 8 * dim**2
        return Cost(macs)

    def _grids(self) -> Iterator[Size]:
        """Tell the tokens of each stage, by frames, height and width."""
        frames, height, width = (-(-whole // side) for whole, side in zip(self.input.size, PATCH, strict=True))
        for _ in self.config.depths:
            yield frames, height, width
            height, width = -(-height // 2), -(-width // 2)


ARCHITECTURE = VideoSwinArchitecture
