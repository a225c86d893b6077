"""Two small towers: one for the mean picture of a clip, one for sound."""

from dataclasses import dataclass

from torch import Tensor, nn

from pretrain.models.base import Architecture


@dataclass
class Config:
    """Two perceptrons."""

    name: str = "two_towers"
    """architecture: pretrain/models/<name>.py"""
    dim: int = 16
    """channels of both embeddings"""


class TwoTowers(nn.Module):
    """Embeddings of clips and of sound."""

    def __init__(self, config: Config, pixels: int, sound: int) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Linear(pixels, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, config.dim))
        self.sound = nn.Sequential(nn.Linear(sound, 32), nn.GELU(), nn.Linear(32, config.dim))

    def forward(self, pixels: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.picture[0].weight.dtype
        return self.picture(pixels.mean(1).flatten(1).to(dtype)), self.sound(sound.to(dtype))


class TwoTowersArchitecture(Architecture):
    """Two towers for an input with sound."""

    def problems(self) -> list[str]:
        return [] if self.config.dim > 0 else [f"model.dim: found {self.config.dim}, allowed: more than 0"]

    def build(self, activation_checkpointing: bool | str = False) -> TwoTowers:
        _, height, width = self.input.size
        return TwoTowers(self.config, 3 * height * width, self.input.rate)


ARCHITECTURE = TwoTowersArchitecture
