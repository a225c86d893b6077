"""SparseFormer: few latent tokens that look at an image or a clip through samples in regions that they move.

Gao, Tong, Wang, Shou: SparseFormer, arXiv 2304.03768; showlab/sparseformer, whose library's names the parameters have,
but for the head, which is called as other classifiers' heads here. Shapes: B clips, N tokens, D channels.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError
from pretrain.models.dropout import drop_path_rates
from pretrain.models.formats import plain_state
from pretrain.models.linear import Linear, truncated_normal
from pretrain.models.official_names import OfficialNames, Renamed
from pretrain.models.recompute import Recompute, maybe_recompute
from pretrain.models.sparseformer import sparseformer_config as sizes
from pretrain.models.sparseformer.regions import first_regions, wide
from pretrain.models.sparseformer.sparseformer_config import Config, Constants
from pretrain.models.sparseformer.sparseformer_weights import layout_of_names, official_names, own_names
from pretrain.models.sparseformer.token_maps import token_maps
from pretrain.models.sparseformer.units import Looks, Table, Unit

#: Side of the stem's window, pixels.
STEM_SIDE = 7
#: Side of a picture divided by that of the map of `forward_maps`.
MAP_STRIDE = 16


class StemConvolution(nn.Conv2d):
    """Convolution over pixels, frame by frame; starts as ReLU networks do."""

    def __init__(self, channels: int) -> None:
        super().__init__(3, channels, STEM_SIDE, stride=2, padding=3)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # the bias is torch's
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class EarlyConvolution(nn.Module):
    """The map that all samplings share: a convolution, and channels normalised at each pixel, without parameters."""

    def __init__(self, channels: int, constants: Constants, video: bool) -> None:
        super().__init__()
        self.constants, self.video = constants, video
        self.conv1 = StemConvolution(channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Make of pixels [B, T, H, W, 3] the map [B, C, H/4, W/4], of clips [B, C, T, H/4, W/4], float32."""
        frames = pixels.flatten(0, 1).permute(0, 3, 1, 2).to(self.conv1.weight.dtype)
        x = wide(F.max_pool2d(F.relu(self.conv1(frames)), 3, stride=2, padding=1))
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=int(self.constants.map_unbiased))
        maps = (x - mean) * torch.rsqrt(variance + self.constants.map_eps)
        return maps.unflatten(0, pixels.shape[:2]).transpose(1, 2).contiguous() if self.video else maps


class SparseFormer(OfficialNames):
    """Map, latent tokens, units, head.

    Args:
        options: model section of the recipe.
        activation_checkpointing: recompute each application of a unit in the backward pass.

    Raises:
        RecipeError: it can't be built.
    """

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        super().__init__()
        if found := sizes.check(options, frames=1):
            raise RecipeError(found)
        full = sizes.resolve(options)
        self.config, self.constants = full, sizes.constants_of(full)
        self.activation_checkpointing = activation_checkpointing
        units = sizes.layout_of(full)
        tokens, dim = (full.tokens or 0), units[-1].dim
        self.feat_extractor = EarlyConvolution(full.channels or 0, self.constants, full.video)
        self.count = tokens * full.replicates
        regions = first_regions(tokens, full.replicates if full.video else None)
        self.initial_roi = Table(self.count, regions.shape[1], functools.partial(_copied, source=regions))
        rows = 1 if self.constants.one_embedding else self.count
        self.initial_embedding = Table(rows, units[0].dim, _wide_normal)
        self.register_module("cls_embedding", None)
        if self.constants.class_at is not None:
            self.cls_embedding = Table(1, dim, nn.init.normal_)
        self.layers = self._layers(units)
        self.norm = nn.LayerNorm(dim, eps=self.constants.norm_eps)
        bias = bool(full.head_bias)
        self.head = Linear(dim, full.classes, bias, init=truncated_normal) if full.classes else nn.Identity()

    def _layers(self, units: tuple[sizes.UnitShape, ...]) -> nn.ModuleList:
        rates = iter(drop_path_rates(self.config.drop_path or 0.0, sum(unit.repeats for unit in units)))
        layers = nn.ModuleList()
        for index, unit in enumerate(units):
            before = units[index - 1].dim if index else unit.dim
            if before != unit.dim:
                norm = nn.LayerNorm(unit.dim, eps=self.constants.norm_eps)
                last = norm if self.constants.transition_norm else nn.Identity()
                layers.append(nn.Sequential(Linear(before, unit.dim, init=truncated_normal), last))
            layers.append(Unit(unit, self.config, [next(rates) for _ in range(unit.repeats)]))
        return layers

    def forward(self, video: Tensor) -> Tensor:
        """Compute logits [B, classes] of clips; see `forward_features`."""
        return self.forward_head(self.forward_features(video))

    def forward_features(self, video: Tensor, pooled: bool = True) -> Tensor:
        """Compute features of images, clips of one frame, or of clips.

        Args:
            video: normalised pixels [B, T, H, W, 3] of any size; or images [B, 3, H, W].
            pooled: one vector a clip, [B, D]; else those of all tokens behind the norm, a class token first,
                [B, n+N, D].
        """
        tokens, _ = self.encode(video)
        if not pooled:
            return self.norm(tokens)
        return self.norm(tokens.mean(1) if self.cls_embedding is None else tokens[:, 0])

    def forward_maps(self, video: Tensor) -> list[Tensor]:
        """Lay the tokens behind the norm, without a class token, out on one map, each over its last region.

        Args:
            video: images as in `forward_features`.

        Returns:
            one map [B, D, H/16, W/16], sizes rounded up; zero where no region is.
        """
        height, width = video.shape[2:4]
        tokens, regions = self.encode(video)
        size = -(-height // MAP_STRIDE), -(-width // MAP_STRIDE)
        return [token_maps(self.norm(tokens[:, -self.count :]), regions, size)[0]]

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of features [B, D]."""
        logits: Tensor = self.head(features)
        return logits

    def from_official(self, state: Mapping[str, Tensor]) -> Renamed:
        return Renamed(own_names(state), layout_of_names(state))

    def to_official(self) -> dict[str, Tensor]:
        """Give the weights under the names of the code whose constants the model has."""
        train = self.config.parity == "train" and not self.config.video
        return official_names(plain_state(self), "train" if train else "library", self.config.video)

    def official_file(self) -> dict[str, Any]:
        return {"model": self.to_official()}

    def encode(self, video: Tensor, looks: Looks | None = None) -> tuple[Tensor, Tensor]:
        """Compute tokens [B, n+N, D] in front of the norm, and their last regions float32 [B, N, 4 or 6].

        Args:
            video: see `forward_features`.
            looks: what the units look at is added here.

        Raises:
            RecipeError: clips of several frames for an image model.
        """
        pixels = video.permute(0, 2, 3, 1)[:, None] if video.dim() == 4 else video
        if pixels.shape[1] != 1 and not self.config.video:
            raise RecipeError(f"clips of {pixels.shape[1]} frames: an image model takes single pictures")
        maps = self.feat_extractor(pixels)
        # Not len(): a number would make the count of pictures a constant of an exported graph.
        batch = pixels.shape[0]
        regions = wide(self.initial_roi()).expand(batch, -1, -1)
        tokens = self.initial_embedding().expand(batch, self.count, -1)
        number = 0
        for layer in self.layers:
            if not isinstance(layer, Unit):
                tokens = layer(tokens)
                continue
            if number == self.constants.class_at and self.cls_embedding is not None:
                tokens = torch.cat((self.cls_embedding().expand(batch, -1, -1), tokens), dim=1)
            number += 1
            for repeat in range(len(layer.drop_paths)):
                tokens, regions = maybe_recompute(
                    self.activation_checkpointing and looks is None, layer, tokens, regions, maps, repeat, looks
                )
        return tokens, regions


def _copied(weight: Tensor, source: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.copy_(source)


def _wide_normal(weight: Tensor) -> Tensor:
    return nn.init.trunc_normal_(weight, std=1.0)
