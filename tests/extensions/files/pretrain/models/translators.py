"""A translator of rasters and its critic."""

from dataclasses import dataclass

from torch import nn

from pretrain.models.base import Architecture


@dataclass
class Config:
    """Two small convolutions."""

    name: str = "translators"
    """architecture: pretrain/models/<name>.py"""
    dim: int = 4
    """channels inside"""


class TranslatorsArchitecture(Architecture):
    """A translator from the first source's channels to the second's, and a critic of the second's."""

    def problems(self) -> list[str]:
        return []

    def build(self, activation_checkpointing: bool | str = False) -> nn.ModuleDict:
        one, two = self.input.channels
        dim = self.config.dim
        translator = nn.Sequential(nn.Conv2d(one, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, two, 3, padding=1))
        critic = nn.Sequential(nn.Conv2d(two, dim, 3, stride=2), nn.GELU(), nn.Conv2d(dim, 1, 3))
        return nn.ModuleDict({"translator": translator, "critic": critic})


ARCHITECTURE = TranslatorsArchitecture
