"""Fixed sin-cos positions over the flattened token index."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def sinusoid_table(tokens: int, dim: int) -> Tensor:
    """The 1-D sinusoid of VideoMAE, float32 [tokens, dim].

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
        table = sinusoid_table(tokens, dim).to(torch.get_default_device())  # meta, where the model is built there
        self.register_buffer("table", table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never round: a table cast to bfloat16 would stay rounded after a cast back to float32.

        Recomputing also fills the buffer when a module built on the meta device is materialised with `to_empty`.
        """
        super()._apply(fn, recurse)
        self.table = sinusoid_table(*self.table.shape).to(self.table.device)
        return self

    def forward(self, index: Tensor) -> Tensor:
        return self.table[index]
