"""A recurrent network that writes bytes from a feature."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.models.base import Architecture


@dataclass
class Config:
    """Its size."""

    name: str = "byte_writer"
    """architecture: pretrain/models/<name>.py"""
    dim: int = 16
    """channels"""


class ByteWriter(nn.Module):
    """A GRU over bytes, begun with a feature."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.start, self.table = nn.Linear(channels, dim), nn.Embedding(256, dim)
        self.cell, self.head = nn.GRUCell(dim, dim), nn.Linear(dim, 256)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, L, 256] of each byte, given those before it."""
        state, rows = self.start(features.to(self.start.weight.dtype)), []
        for before in torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1).unbind(1):
            state = self.cell(self.table(before), state)
            rows.append(self.head(state))
        return torch.stack(rows, dim=1)


class ByteWriterArchitecture(Architecture):
    """A writer from features."""

    def problems(self) -> list[str]:
        return []

    def build(self, activation_checkpointing: bool | str = False) -> ByteWriter:
        return ByteWriter(self.config.dim, self.input.channels)


ARCHITECTURE = ByteWriterArchitecture
