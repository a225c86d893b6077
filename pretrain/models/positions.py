"""Fixed sin-cos positions over the flattened token index."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.cubes import Grid

#: Tables of other sizes than a model was built for that are kept; of ViT-L on films one takes 15 MB.
KEPT_GRIDS = 8


def sinusoid_table(tokens: int, dim: int) -> Tensor:
    """Compute the 1-D sinusoid of VideoMAE, float32 [tokens, dim].

    angle(n, j) = n / 10000^(2*floor(j/2)/dim), sine at even j, cosine at odd j, over the flattened index n: not
    factorised over time, rows and columns. Computed in float64 (official `get_sinusoid_encoding_table`), since float32
    angles of late tokens are off in the fourth digit; in NumPy, since `deepspeed.zero.Init` rounds what torch makes.
    """
    column = np.arange(dim)
    angle = np.arange(tokens, dtype=np.float64)[:, None] / np.power(10000.0, 2 * (column // 2) / dim)
    table = np.where(column % 2 == 0, np.sin(angle), np.cos(angle))
    return torch.from_numpy(table.astype(np.float32))


class SinCosPositions(nn.Module):
    """The table as a non-persistent buffer [tokens, dim] that follows the module's device but stays float32.

    Called with token indices [B, n] it returns their rows [B, n, dim].
    """

    table: Tensor

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.shape = (tokens, dim)
        # Not in checkpoints: official files have none, so the strict loader would miss it.
        self.register_buffer("table", self._table_on(torch.get_default_device()), persistent=False)

    def make_table(self) -> Tensor:
        """Compute the table, float32 on the CPU."""
        return sinusoid_table(*self.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never round: a table cast to bfloat16 would stay rounded after a cast back to float32.

        Recomputing also fills the buffer when a module built on the meta device is materialised with `to_empty`.
        """
        super()._apply(fn, recurse)
        self.table = self._table_on(self.table.device)
        return self

    def _table_on(self, device: torch.device) -> Tensor:
        # A model that is built to be counted takes no memory, however wide it is.
        return torch.empty(self.shape, device=device) if device.type == "meta" else self.make_table().to(device)

    def forward(self, index: Tensor) -> Tensor:
        return self.table[index]


class InterpolatedPositions(SinCosPositions):
    """The table of the pre-training grid, stretched to another grid.

    A table rebuilt for the new grid numbers its tokens anew, so that a token's code says another place than the weights
    have learned. Stretching keeps the place: bicubic over rows and columns, linear over time.

    Args:
        grid: of the clips to come.
        source: of pre-training.
        dim: channels.
    """

    def __init__(self, grid: Grid, source: Grid, dim: int) -> None:
        self.grid, self.source = grid, source  # before the base class, whose constructor calls make_table
        self._others: dict[Grid, Tensor] = {}
        super().__init__(grid.tokens, dim)

    def make_table(self) -> Tensor:
        """Compute the stretched table, float32 on the CPU."""
        return self._stretched(self.grid)

    def table_of(self, grid: Grid) -> Tensor:
        """Give the table [tokens, dim] of any grid, where clips vary in size; the last few sizes are kept."""
        if grid == self.grid:
            return self.table
        if grid not in self._others:
            if len(self._others) >= KEPT_GRIDS:
                self._others.pop(next(iter(self._others)))
            self._others[grid] = self._stretched(grid)
        # Another device since: a model that has moved.
        self._others[grid] = self._others[grid].to(self.table.device)
        return self._others[grid]

    def _stretched(self, grid: Grid) -> Tensor:
        return stretch_table(sinusoid_table(self.source.tokens, self.shape[1]), self.source, grid)


def stretch_table(table: Tensor, source: Grid, grid: Grid) -> Tensor:
    """Stretch a position table [tokens of `source`, C] to `grid`, [tokens of `grid`, C].

    Bicubic in space and linear in time, cell centres aligned (align_corners false), as the official code stretches
    where it works (VideoMAEv2, run_class_finetuning.py); here for any two grids.
    """
    planes = table.unflatten(0, (source.time, source.height, source.width)).permute(0, 3, 1, 2)
    # Left alone where sides agree, so that on the grid of pre-training both kinds of table are the same to the bit.
    if (source.height, source.width) != (grid.height, grid.width):
        planes = F.interpolate(planes, size=(grid.height, grid.width), mode="bicubic", align_corners=False)
    if source.time != grid.time:
        lines = planes.flatten(1).t()[None]
        lines = F.interpolate(lines, size=grid.time, mode="linear", align_corners=False)
        planes = lines[0].t().unflatten(1, planes.shape[1:])
    return planes.permute(0, 2, 3, 1).flatten(0, 2)


def stretch_class_table(table: Tensor, source: Grid, grid: Grid) -> Tensor:
    """Stretch a table whose first row is the class token's, [1 + tokens, C]; that one has no place on the grid."""
    if grid == source:
        return table
    return torch.cat((table[:1], stretch_table(table[1:], source, grid)))
