"""Dropout and stochastic depth drawn by position: the same for any number of ranks and any micro-batch.

Whether an element stays is a function of (seed, epoch, position, view, layer, element), by the counter-based generator
SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014). So recomputation in the backward
pass draws what the forward pass drew, and nothing waits for a device. A model that no engine trains draws from torch's
generator, as torch's own layers do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.data.randomness import key_of

#: Entry of a micro-batch: keys int64 [B] of its rows.
ROW_KEYS = "row_keys"
#: Columns of a micro-batch that name a row; see `Samples.collate`.
COLUMNS = ("epoch", "position", "view")
#: SplitMix64: the increment, and shift and factor of each round; unsigned 64-bit numbers as signed ones.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))


@dataclass
class Rows:
    """Keys int64 [B] of the micro-batch that passes through a model; None: no engine trains it."""

    keys: Tensor | None = None


def with_row_keys(seed: int, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys of its rows to a micro-batch that is still on the CPU and says where they come from."""
    if not batch.keys() >= {*COLUMNS}:
        return dict(batch)
    # Not strict: the stand-in behind a data error has no views, and its step is dropped.
    places = zip(*(batch[name].tolist() for name in COLUMNS), strict=False)
    keys = [_signed(key_of(seed, *(int(number) for number in place), "forward")) for place in places]
    return {**batch, ROW_KEYS: torch.tensor(keys, dtype=torch.int64)}


def draw_by_position(model: nn.Module) -> Rows:
    """Let all dropout and stochastic depth of a model follow the rows that are returned; set their keys at each pass.

    Layers are told apart by their names in `model`: call it before the model is wrapped or compiled.
    """
    rows = Rows()
    for name, layer in model.named_modules():
        if isinstance(layer, Dropout | DropPath):
            layer.rows, layer.key = rows, _signed(key_of(name))
    return rows


class Dropout(nn.Dropout):
    """Dropout of single elements."""

    rows: Rows | None = None
    key: int = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = _kept(self.rows, self.key, x, x[0].numel(), self.p)
        return super().forward(x) if keep is None else x * keep.view(x.shape) * (1 / (1 - self.p))


class ChannelDropout(Dropout):
    """Dropout of whole channels of maps [B, C, h, w], whose neighbouring elements would give a lost one away."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = _kept(self.rows, self.key, x, x.shape[1], self.p)
        return F.dropout2d(x, self.p) if keep is None else x * keep[:, :, None, None] * (1 / (1 - self.p))


class DropPath(nn.Module):
    """Stochastic depth: a sample leaves out a residual branch, the others' branches are scaled up (timm's DropPath).

    Args:
        rate: probability.
    """

    rows: Rows | None = None
    key: int = 0

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        keep = _kept(self.rows, self.key, x, 1, self.rate)
        if keep is None:
            return x * F.dropout(x.new_ones(shape), self.rate)
        return x * (keep.view(shape).to(x.dtype) / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def dropout_layer(rate: float) -> nn.Module:
    """Build dropout, or the identity where the rate is 0."""
    return Dropout(rate) if rate > 0 else nn.Identity()


def stochastic_depth(rate: float) -> nn.Module:
    """Build stochastic depth, or the identity where the rate is 0."""
    return DropPath(rate) if rate > 0 else nn.Identity()


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Give rates rising linearly from 0 in the first block to `rate` in the last."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def _kept(rows: Rows | None, layer: int, x: Tensor, count: int, rate: float) -> Tensor | None:
    """Say which of `count` elements stay in each row, bool [B, count]; None where x has other rows than the batch."""
    if rows is None or rows.keys is None or len(rows.keys) != len(x):
        return None
    return keep_mask(rows.keys, layer, count, rate)


def keep_mask(keys: Tensor, layer: int, count: int, rate: float) -> Tensor:
    """Draw bool [B, count], false with probability `rate`, for rows with keys int64 [B]."""
    # Uniform over the signed numbers: the lowest `rate` of them drop.
    return drawn_numbers(keys, layer, count) >= math.floor(rate * 2**64) - 2**63


def drawn_numbers(keys: Tensor, purpose: int, count: int) -> Tensor:
    """Draw int64 [B, count], uniform over all of them, for rows with keys int64 [B]; `purpose` tells draws apart."""
    counter = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    return _mixed(_mixed(keys ^ purpose)[:, None] + counter)


def _mixed(z: Tensor) -> Tensor:
    """Mix the bits of int64 numbers, which wrap like unsigned ones."""
    for shift, factor in _ROUNDS:
        # torch's shift keeps the sign, and SplitMix64's does not.
        z = (z >> shift).bitwise_and_(2 ** (64 - shift) - 1).bitwise_xor_(z).mul_(factor)
    return z


def _signed(key: int) -> int:
    """Take 64 bits of a key as a signed number."""
    return (key & 2**64 - 1) - 2**63
