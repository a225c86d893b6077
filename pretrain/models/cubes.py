"""Clips cut into space-time cubes, one per token, and back.

Token n = (t*H' + y)*W' + x on the grid [T', H', W']; elements of a cube are in the order (frame, row, column, channel),
channel fastest. Sources: official `engine_for_pretraining.py`, systems/videomae.md sections 2 and 5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import RecipeError


@dataclass(frozen=True)
class Grid:
    """Cubes of a clip along time, height and width."""

    time: int
    height: int
    width: int

    @property
    def slice(self) -> int:
        """Tokens of one time step."""
        return self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the clip, N."""
        return self.time * self.slice


def grid_problems(frames: int, height: int, width: int, tubelet: int, patch: int) -> list[str]:
    """List what keeps a clip of this size from being cut into whole cubes."""
    sizes = (
        ("input.frames", frames, "model.tubelet", tubelet),
        ("input.height", height, "model.patch_size", patch),
        ("input.width", width, "model.patch_size", patch),
    )
    # A unit below 1 is what to change, and nothing can be divided by 0; two sides name the same one.
    if too_small := {unit_key: unit for _, _, unit_key, unit in sizes if unit < 1}:
        return [f"{key}: found {unit}, allowed: 1 or more" for key, unit in too_small.items()]
    return [
        f"{key}={size}: not a multiple of {unit_key}={unit}; use {max(round(size / unit), 1) * unit}"
        for key, size, unit_key, unit in sizes
        if size < 1 or size % unit
    ]


def grid_of(frames: int, height: int, width: int, tubelet: int, patch: int) -> Grid:
    """Compute the token grid of a clip.

    Raises:
        RecipeError: a side is not a multiple of its cube's.
    """
    problems = grid_problems(frames, height, width, tubelet, patch)
    if problems:
        raise RecipeError(problems)
    return Grid(frames // tubelet, height // patch, width // patch)


def cut_cubes(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """Cut a video [B, T, H, W, 3] of any type into cubes [B, N, tubelet*p*p*3]."""
    batch, frames, height, width, channels = video.shape
    grid = grid_of(frames, height, width, tubelet, patch)
    split = video.reshape(batch, grid.time, tubelet, grid.height, patch, grid.width, patch, channels)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, grid.tokens, tubelet * patch * patch * channels)


def join_cubes(cubes: Tensor, grid: Grid, tubelet: int, patch: int) -> Tensor:
    """Join cubes to videos; inverse of `cut_cubes`."""
    split = cubes.reshape(len(cubes), grid.time, grid.height, grid.width, tubelet, patch, patch, -1)
    video = split.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return video.reshape(len(cubes), grid.time * tubelet, grid.height * patch, grid.width * patch, -1)


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Take rows `index` [B, n] of `tokens` [B, N, D], in that order: [B, n, D]."""
    first = torch.arange(tokens.shape[0], device=tokens.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def complement(index: Tensor, tokens: int) -> Tensor:
    """List the tokens [B, N-n], ascending, that `index` [B, n] does not hold; n must be the number of distinct ones."""
    taken = torch.zeros(index.shape[0], tokens, dtype=torch.int8, device=index.device).scatter(1, index, 1)
    # Stable: an unstable sort may give the zeros in any order, and positions of the dropped tokens with it.
    return taken.argsort(dim=1, stable=True)[:, : tokens - index.shape[1]]
