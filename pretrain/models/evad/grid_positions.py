"""Fixed sin-cos positions for clips whose frames differ in size from batch to batch."""

from typing import Literal

import torch
from torch import Tensor

from pretrain.models.cubes import Grid
from pretrain.models.positions import sinusoid_table, stretch_table

#: Grids whose tables are kept; short side and multiple of the padding allow a few dozen.
KEPT = 64


class GridPositions:
    """Tables of the pre-training grid, bicubically stretched to each grid that is asked for, time step by time step.

    Not a module: it has neither parameters nor buffers, and official files have no table either.

    Args:
        source: grid of pre-training; other grids must have as many time steps.
        dim: channels.
        rule: `stretch`: whatever differs from `source`; `official`: only grids of another number of tokens, so that
            28x7 gets the codes of 14x14 as they are (EVAD, a quirk).
    """

    def __init__(self, source: Grid, dim: int, rule: Literal["stretch", "official"] = "stretch") -> None:
        self.source, self.dim, self.rule = source, dim, rule
        self._tables: dict[tuple[Grid, torch.device], Tensor] = {}

    def __call__(self, grid: Grid, like: Tensor) -> Tensor:
        """Give the table [tokens, C] of a grid, on the device and in the type of `like`."""
        key = (grid, like.device)
        table = self._tables.get(key)
        if table is None:
            table = self.make_table(grid).to(like.device)
            if len(self._tables) >= KEPT:
                self._tables.clear()
            # What is computed while a plan traces fake tensors has no content, and would stay here.
            if type(table) is Tensor:
                self._tables[key] = table
        return table.to(like.dtype)

    def make_table(self, grid: Grid) -> Tensor:
        """Compute the table of a grid, float32 on the CPU."""
        table = sinusoid_table(self.source.tokens, self.dim)
        if self.rule == "official" and grid.tokens == self.source.tokens:
            return table
        return stretch_table(table, self.source, grid)
