"""Models whose published files have other names than their parameters here."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Renamed:
    """Weights of a file under a model's own names.

    Attributes:
        state: the weights; names that the model has no use for stay, for the report.
        layout: that the file's names are of.
        may_miss: glob patterns of parameters that files of this layout don't have, and that keep their first values.
        may_ignore: glob patterns of what the model has no place for.
    """

    state: dict[str, Tensor]
    layout: str
    may_miss: tuple[str, ...] = ()
    may_ignore: tuple[str, ...] = ()


class OfficialNames(nn.Module, abc.ABC):
    """A model that translates the names of published files; its head is called `head`."""

    @abc.abstractmethod
    def from_official(self, state: Mapping[str, Tensor]) -> Renamed:
        """Bring weights in any layout, this model's own among them, under its names.

        Raises:
            WeightsError: a layout that this model does not know.
        """

    @abc.abstractmethod
    def to_official(self) -> dict[str, Tensor]:
        """Give the weights under the names of the published code."""

    def official_file(self) -> dict[str, Any]:
        """Give what a checkpoint of the published trainer holds of a model: its weights, named as inside a wrapper."""
        return {"state_dict": {f"module.{name}": value for name, value in self.to_official().items()}}
