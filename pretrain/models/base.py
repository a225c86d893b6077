"""Contract of a recipe's `model:` section: one file of pretrain/models/ with `Config` and `ARCHITECTURE`.

`Config` is a dataclass of the section's keys, its first field `name`; `ARCHITECTURE` a subclass of one of the classes
here, which says what methods can do with it. Methods ask for the class that they need, never for a name.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.cubes import Grid
from pretrain.models.recompute import Recompute
from pretrain.recipe.components import load_component
from pretrain.recipe.schema import Recipe

#: Attribute under which an objective holds its model, and so the first part of the model's names in a checkpoint.
MODEL = "model"
#: Modules that a recipe's `model.name` names.
MODELS = "pretrain.models.{}"


@dataclass(frozen=True)
class Cost:
    """Work of one row's forward pass.

    Attributes:
        macs: multiply-accumulates by part, as publications count them; a part named `skipped: ...` belongs to that
            count but is not executed here.
        tokens: tokens by what becomes of them; `all` is what speed is measured in. Empty for models without tokens.
    """

    macs: dict[str, float]
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def published(self) -> float:
        """Multiply-accumulates as publications count them."""
        return sum(self.macs.values())

    @property
    def executed(self) -> float:
        """Multiply-accumulates that this code does."""
        return sum(count for name, count in self.macs.items() if not name.startswith("skipped"))


def side_problems(size: tuple[int, int, int], name: str, least: int, part: str) -> list[str]:
    """Refuse pictures smaller than a single window of a model's first part: it would train, mostly on padding.

    Args:
        size: frames, height and width of a clip, pixels.
        name: of the model.
        least: side of the window, pixels.
        part: what it is of, for the message.
    """
    frames, height, width = size
    if min(height, width) >= least:
        return []
    return [f"input: found {height} x {width} pixels, allowed with model.name={name}: sides from {least}, {part}"]


class Architecture(abc.ABC):
    """A model as a recipe describes it.

    Args:
        config: the recipe's model section.
        input: the recipe's input section.
    """

    #: Whether the official VideoMAE code and transformers have a layout for its weights.
    videomae_layouts: ClassVar[bool] = False

    def __init__(self, config: Any, input: Any) -> None:
        self.config, self.input = config, input

    @staticmethod
    def resolve(config: Any) -> Any:
        """Fill in what the configuration leaves to a preset."""
        return config

    def lr_scale(self, name: str) -> float:
        """Give a factor on a parameter's learning rate, beside that of its layer."""
        return 1.0

    def decays(self, name: str, shape: Iterable[int]) -> bool:
        """Tell whether weight decay may apply to a parameter, which else its name and shape decide."""
        return True

    @property
    def cross_rank_batch_norm(self) -> bool | None:
        """Whether its batch norms take their statistics of all ranks' rows while training; None: it has none that do
        take any, and a head's are the task's affair."""
        return None

    @abc.abstractmethod
    def problems(self) -> list[str]:
        """List what keeps the model from being built for this input."""

    @abc.abstractmethod
    def build(self, activation_checkpointing: Recompute = False) -> nn.Module:
        """Build the module with its first weights."""


class MaskedAutoencoder(Architecture):
    """An encoder of visible cubes with a decoder that predicts cubes.

    Its module has `grid`, `shape.tubelet`, `shape.patch_size` and forward(cubes [B, Nv, cube], visible [B, Nv],
    targets [B, M]) -> predictions [B, M, cube]. One that `encodes` also has `mask_token` and
    encoder(cubes [B, N, cube], tokens [B, N]) -> [B, N, C].
    """

    #: Whether its encoder can be called by itself on all cubes, as the recipe's health block does.
    encodes: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def grid(self) -> Any:
        """Token grid of the input, a `pretrain.models.cubes.Grid`."""

    @abc.abstractmethod
    def cost(self, visible: int, targets: int) -> dict[str, float]:
        """Count multiply-accumulates of one clip's forward pass, by part."""


@dataclass(frozen=True)
class MapLevel:
    """A map [B, channels, H/stride, W/stride] of pictures, sizes rounded up.

    Attributes:
        channels: of the map.
        stride: side of a picture divided by that of its map.
    """

    channels: int
    stride: int


@dataclass(frozen=True)
class Looking:
    """Pictures of where a model looks.

    Attributes:
        rows: by name, something drawn into each of the clips, uint8 [B, T, H, W, 3].
        sheet: all that it sees of the first clip in one picture, uint8 [H, W, 3].
    """

    rows: dict[str, Tensor]
    sheet: npt.NDArray[np.uint8]


class Classifier(Architecture):
    """A backbone with a head: forward(pixels) -> logits [B, classes].

    Its module has timm's names: `forward_features(pixels, pooled=True)` gives the pooled vector [B, C] or all tokens
    [B, N, C], `forward_head` logits of pooled vectors. Adapters attach to modules that inherit from `Backbone`.
    """

    #: Whether its published code has a layout for it: its module has the official names, or is an `OfficialNames`.
    official_layout: ClassVar[bool] = False
    #: Whether frames of another height and width than the input section's can be judged.
    any_size: ClassVar[bool] = False
    #: Whether it needs compute.dtype=fp32, as running statistics of batch norms do: in bfloat16 small steps are lost.
    full_precision: ClassVar[bool] = False
    #: Whether `looks` draws where the module looks.
    draws_looks: ClassVar[bool] = False
    #: First parts of the names of parameters beside the head's that `forward_maps` does not reach, see `maps`.
    behind_maps: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Count the work of one row's forward pass."""

    @abc.abstractmethod
    def layer_of(self, name: str) -> tuple[int, int]:
        """Tell a parameter's layer and the last layer's number, for layer-wise learning rates.

        0 is the embedding; the head and what stands behind the blocks belong to the last layer.
        """

    def own_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Bring weights that a run starts from, in any layout of this kind of model's files, to its own names."""
        return state

    def for_inference(self, module: nn.Module) -> nn.Module:
        """Give a module with the same answers in fewer operations, for graphs that are exported."""
        return module

    def token_grid(self, frames: int, height: int, width: int) -> Grid:
        """Tell where the tokens lie that `forward_features(pixels, pooled=False)` gives of a clip: the last ones, in
        the order (t, y, x), behind class tokens.

        Raises:
            RecipeError: this kind of model has no tokens on a grid, or the size does not fit.
        """
        raise RecipeError(
            f"model.name={self.config.name}: has no tokens on a grid, which this task pools from; take classifier or "
            "image_vit, or give your architecture a `token_grid`"
        )

    def looks(self, module: Any, video: Tensor, pixels: Tensor) -> Looking:
        """Draw where the module looks, for a kind of model that does not look everywhere (`draws_looks`).

        Args:
            module: what `build` made.
            video: clips uint8 [B, T, H, W, 3].
            pixels: the same clips, normalised.
        """
        raise NotImplementedError(f"{type(self).__name__} draws no looks")

    def maps(self) -> tuple[MapLevel, ...]:
        """Tell the maps, finest first, that its module's `forward_maps(pixels)` gives of pictures; empty: there is no
        such method, since all tokens lie on one grid (`token_grid`)."""
        return ()


@dataclass(frozen=True)
class MapsShape:
    """Maps of a backbone.

    Attributes:
        channels: of each pathway, slow before fast.
        times: time steps of each.
        scale: side of a map divided by that of the pictures.
    """

    channels: tuple[int, ...]
    times: tuple[int, ...]
    scale: float


class MapsBackbone(Architecture):
    """A backbone of maps over time: forward_features(pixels) -> maps [B, C, T, H, W] of each pathway.

    It has no tokens and no head, and takes clips of any height and width.
    """

    @abc.abstractmethod
    def maps(self) -> MapsShape:
        """Tell the sizes of its maps."""

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Count the work of one row's forward pass."""

    def layer_of(self, name: str) -> tuple[int, int]:
        """Tell a parameter's layer and the last layer's number, see `Classifier`; here all are of one layer, 0."""
        return 0, 0

    def start_choices(self) -> int:
        """Tell among how many first frames training draws one for each clip.

        Above 1 `forward_features(pixels, starts)` takes what was drawn, int64 [B].
        """
        return 1


class Detector(Architecture):
    """A model that finds persons and tells their actions: forward(pixels, sizes of the frames) -> predictions.

    Its boxes come from itself; a backbone for boxes that are given is a `Classifier`. Rows of a batch may have frames
    of any size, padded to the largest.
    """

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Count the work of one row's forward pass, at the size that the input section names."""

    @abc.abstractmethod
    def layer_of(self, name: str) -> tuple[int, int]:
        """Tell a parameter's layer and the last layer's number, see `Classifier`."""


def architecture_of(recipe: Recipe, kind: Any = Architecture) -> Any:
    """Look up the architecture that a recipe names.

    Raises:
        RecipeError: there is none of that name, or it is not of the kind that the caller needs.
    """
    module = load_component("model", recipe.model.name, MODELS)
    found = module.ARCHITECTURE(recipe.model, recipe.input)
    # By kind, not by name: a model of the user's works wherever its kind does.
    if not isinstance(found, kind):
        own = next(base.__name__ for base in type(found).__mro__ if base.__module__ == __name__)
        meaning = (kind.__doc__ or "").partition("\n")[0].rstrip(".")
        raise RecipeError(
            f"model.name: found {recipe.model.name}, of the kind {own}; allowed with objective "
            f"{recipe.objective.name}: the kind {kind.__name__} ({meaning})"
        )
    return found
