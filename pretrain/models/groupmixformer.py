"""GroupMixFormer: four stages of attention between tokens and groups of tokens (Ge et al., arXiv 2311.15157).

Specification: systems/groupmixformer.md, from AILab-CVC/GroupMixFormer, whose names its parameters have. Pictures of
any size: strided convolutions pad, so maps have a side of ceil(side / stride); officially odd maps are refused.
Shapes: B pictures, D channels of a stage, H x W its map, N = HW tokens, h = 8 heads of c channels, s = D/5 = 2c
channels of a segment.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.errors import RecipeError
from pretrain.models.backbone import build_head
from pretrain.models.base import Classifier, Cost, MapLevel, side_problems
from pretrain.models.cubes import Grid
from pretrain.models.dropout import drop_path_rates
from pretrain.models.folded_norms import ConvolutionsBeforeNorms, with_folded_norms
from pretrain.models.group_mix_attention import (
    HEADS,
    KERNELS,
    POSITION_HEADS,
    SEGMENTS,
    GroupMixBlock,
    MapNorm,
    SeparableConvolution,
    map_norm,
)
from pretrain.models.pixels import single_pictures
from pretrain.models.recompute import Recompute, maybe_recompute
from pretrain.models.weights import official_state

STAGES = 4
#: Side of a picture divided by that of the first stage's map.
FIRST_STRIDE = 4
#: Side of the window of the stem's two convolutions together, pixels.
STEM_REACH = 7

#: Published sizes: channels, blocks and MLP ratios of each stage, stochastic depth rate. The file of the official large
#: model says that its rate needs adjusting (0.1); 0.5 is birder's.
SIZES: dict[str, tuple[list[int], list[int], list[float], float]] = {
    "mobile": ([40, 80, 160, 160], [3, 3, 12, 4], [4, 4, 4, 4], 0.1),
    "tiny": ([80, 160, 200, 240], [4, 4, 12, 4], [4, 4, 4, 4], 0.1),
    "small": ([80, 160, 320, 320], [2, 4, 12, 4], [4, 4, 4, 4], 0.2),
    "base": ([200, 240, 320, 480], [8, 8, 12, 8], [2, 2, 4, 4], 0.5),
    "large": ([240, 320, 360, 480], [8, 10, 30, 10], [4, 4, 2, 2], 0.5),
}


@dataclass
class Config:
    """A size, the classifier, batch norm; null means: as the size has it."""

    name: str = "groupmixformer"
    """architecture: pretrain/models/<name>.py"""
    size: Literal["mobile", "tiny", "small", "base", "large", "custom"] = "base"
    """published size; custom: every field below that is null must be given"""
    dims: list[int] | None = None
    """channels of each of the four stages, multiples of 10"""
    depths: list[int] | None = None
    """blocks of each stage"""
    mlp_ratios: list[float] | None = None
    """hidden channels of an MLP = int(channels x ratio), of each stage"""
    classes: int = 1000
    """outputs of the head; 0: no head"""
    drop_path: float | None = None
    """stochastic depth rate of the last block, rising linearly from 0 over all stages"""
    batch_norm: Literal["all_ranks", "rank", "frozen"] = "all_ranks"
    """rows whose statistics normalise in training: those of all ranks' micro-batches (official), of a rank's own, or
    none, running statistics as they were loaded (small batches)"""
    norm: Literal["batch", "group"] = "batch"
    """of maps; group: in the place of every batch norm one over 8 or a few more channels of each picture alone (small
    batches, from random weights), for which batch_norm says nothing"""


#: Fields that a size fills in.
SIZE_FIELDS = ("dims", "depths", "mlp_ratios", "drop_path")


def resolve(config: Config) -> Config:
    """Fill every null in from the size."""
    if config.size == "custom":
        return config
    published: dict[str, Any] = dict(zip(SIZE_FIELDS, SIZES[config.size], strict=True))
    return replace(config, **{key: value for key, value in published.items() if getattr(config, key) is None})


def check(config: Config) -> list[str]:
    """List what keeps this model from being built."""
    full = resolve(config)
    if missing := [key for key in SIZE_FIELDS if getattr(full, key) is None]:
        return [f"model.{key}: needs a value, since model.size=custom has none" for key in missing]
    dims, depths, ratios, rate = (getattr(full, key) for key in SIZE_FIELDS)
    found = [
        f"model.{key}={list(value)}, allowed: {STAGES} numbers above 0, one for each stage"
        for key, value in (("dims", dims), ("depths", depths), ("mlp_ratios", ratios))
        if len(value) != STAGES or min(value) <= 0
    ]
    if odd := [dim for dim in dims if dim % (2 * SEGMENTS)]:
        why = f"{SEGMENTS} segments, {HEADS} heads over four of them"
        found.append(f"model.dims={list(dims)}: {odd[0]} is no multiple of {2 * SEGMENTS} ({why})")
    if full.classes < 0:
        found.append(f"model.classes={full.classes}: 0 (no head) or more is needed")
    if not 0 <= rate < 1:
        found.append(f"model.drop_path={rate}: a probability from 0 to below 1 is needed")
    return found


class PictureStem(ConvolutionsBeforeNorms):
    """Two convolutions of stride 2, each with norm and Hardswish."""

    NORMS = (("proj1", "norm1"), ("proj2", "norm2"))

    def __init__(self, dim: int, norm: MapNorm) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(3, dim // 2, 3, 2, 1)
        self.norm1 = map_norm(dim // 2, norm)
        self.proj2 = nn.Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm2 = map_norm(dim, norm)

    def forward(self, pictures: Tensor) -> Tensor:
        """Compute the map [B, D, H/4, W/4] of pictures [B, 3, H, W]."""
        x = F.hardswish(self.norm1(self.proj1(pictures)))
        return F.hardswish(self.norm2(self.proj2(x)))


class StageEmbedding(ConvolutionsBeforeNorms):
    """Separable convolution in front of a stage, which halves the map's sides before all but the first."""

    NORMS = (("proj.pointwise_conv", "norm"),)

    def __init__(self, inputs: int, outputs: int, stride: int, norm: MapNorm) -> None:
        super().__init__()
        self.proj = SeparableConvolution(inputs, outputs, 3, stride)
        self.norm = map_norm(outputs, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Turn the map [B, C, y, x] of the stage before into this one's tokens [B, D, H, W]."""
        return F.hardswish(self.norm(self.proj(x)))


class GroupMixStage(nn.Module):
    """Blocks of one width."""

    def __init__(self, dim: int, hidden: int, rates: list[float], norm: MapNorm) -> None:
        super().__init__()
        self.gma_stage = nn.ModuleList(GroupMixBlock(dim, hidden, rate, norm) for rate in rates)

    def forward(self, maps: Tensor, recompute: Recompute = False) -> Tensor:
        """Transform a map [B, D, H, W]."""
        height, width = maps.shape[2:]
        x = maps.flatten(2).transpose(1, 2)
        for block in self.gma_stage:
            x = maybe_recompute(recompute, block, x, height, width)
        return x.transpose(1, 2).unflatten(2, (height, width))


class GroupMixFormer(nn.Module):
    """Stem, stages, and a head.

    Args:
        options: model section of the recipe.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        RecipeError: it can't be built.
    """

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        super().__init__()
        if problems := check(options):
            raise RecipeError(problems)
        self.options, self.activation_checkpointing = options, activation_checkpointing
        dims, depths, ratios, rate = (getattr(resolve(options), key) for key in SIZE_FIELDS)
        rates = iter(drop_path_rates(rate, sum(depths)))
        norm = options.norm
        self.conv_stem = PictureStem(dims[0], norm)
        widths = zip([dims[0], *dims], dims, strict=False)
        self.patch_embed_layers = nn.ModuleList(
            StageEmbedding(before, dim, 1 if stage == 0 else 2, norm)
            for stage, (before, dim) in enumerate(widths)
        )
        stages = [
            GroupMixStage(dim, int(dim * ratio), [next(rates) for _ in range(depth)], norm)
            for dim, depth, ratio in zip(dims, depths, ratios, strict=True)
        ]
        # No ModuleList: its members, whole stages, would be compiled as one graph each (engine/compiled_parts.py).
        self.groupmixformer_backbone = nn.ModuleDict({str(index): stage for index, stage in enumerate(stages)})
        self.norm4 = map_norm(dims[-1], norm)
        self.head = build_head("linear", dims[-1], options.classes, scale=1.0)

    def train(self, mode: bool = True) -> "GroupMixFormer":
        super().train(mode)
        if self.options.batch_norm == "frozen":
            # Not the head's, which a task may bring: its statistics were never loaded.
            parts = [part for name, part in self.named_children() if name != "head"]
            for module in itertools.chain.from_iterable(part.modules() for part in parts):
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits [B, classes] of normalised pictures; see `forward_maps`."""
        return self.forward_head(self.forward_features(pixels))

    def forward_maps(self, pixels: Tensor) -> list[Tensor]:
        """Compute the maps of all stages, without a norm.

        Args:
            pixels: normalised pictures [B, 3, H, W] of any size, or clips of one frame [B, 1, H, W, 3].

        Returns:
            four maps [B, D, H/stride, W/stride] of strides 4, 8, 16 and 32, sizes rounded up.
        """
        x = self.conv_stem(single_pictures(pixels, self.options.name).to(self.conv_stem.proj1.weight.dtype))
        maps = []
        for embedding, stage in zip(self.patch_embed_layers, self.groupmixformer_backbone.values(), strict=True):
            x = stage(embedding(x), self.activation_checkpointing)
            maps.append(x)
        return maps

    def forward_features(self, pixels: Tensor, pooled: bool = True) -> Tensor:
        """Compute features [B, C], or with `pooled` false those of all places of the last map [B, N, C]."""
        tokens: Tensor = self.norm4(self.forward_maps(pixels)[-1]).flatten(2).transpose(1, 2)
        return tokens.mean(1) if pooled else tokens

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [B, classes] of features [B, C]."""
        logits: Tensor = self.head(features)
        return logits


class GroupMixFormerArchitecture(Classifier):
    """GroupMixFormer as a recipe describes it; its input is clips of one frame."""

    behind_maps = ("norm4.",)
    any_size = True
    full_precision = True
    official_layout = True

    @staticmethod
    def resolve(config: Config) -> Config:
        return resolve(config)

    def problems(self) -> list[str]:
        found = check(self.config)
        if self.input.size[0] != 1:
            found.append(f"input.frames={self.input.size[0]}: groupmixformer takes single pictures; set input.frames=1")
        return found + side_problems(self.input.size, self.config.name, STEM_REACH, "the stem's window")

    def build(self, activation_checkpointing: Recompute = False) -> GroupMixFormer:
        return GroupMixFormer(self.config, activation_checkpointing)

    def own_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # Here, since that module knows this one.
        from pretrain.models.groupmixformer_weights import check_fit

        check_fit(self.config, official_state(state))
        return state

    def for_inference(self, module: nn.Module) -> nn.Module:
        return with_folded_norms(module)

    @property
    def cross_rank_batch_norm(self) -> bool | None:
        if self.config.norm == "group":
            return None
        return {"all_ranks": True, "rank": False, "frozen": None}[self.config.batch_norm]

    def maps(self) -> tuple[MapLevel, ...]:
        dims = resolve(self.config).dims or []
        return tuple(MapLevel(dim, FIRST_STRIDE * 2**stage) for stage, dim in enumerate(dims))

    def token_grid(self, frames: int, height: int, width: int) -> Grid:
        last = self.maps()[-1].stride
        return Grid(frames, math.ceil(height / last), math.ceil(width / last))

    def layer_of(self, name: str) -> tuple[int, int]:
        depths, parts = resolve(self.config).depths or [], name.split(".")
        last = sum(depths) + 1
        if parts[0] == "conv_stem":
            return 0, last
        if parts[0] == "patch_embed_layers":  # it belongs to the block before it
            return sum(depths[: int(parts[1])]), last
        if parts[0] != "groupmixformer_backbone":
            return last, last
        return sum(depths[: int(parts[1])]) + int(parts[3]) + 1, last

    def cost(self) -> Cost:
        """Count as the published numbers were (fvcore): a batch norm is 2 for each value, any other norm 5."""
        full, norm = resolve(self.config), 2 if self.config.norm == "batch" else 5
        dims, depths, ratios = full.dims or [], full.depths or [], full.mlp_ratios or []
        (_, height, width), before, tokens = self.input.size, dims[0], next(self._tokens())
        half = math.ceil(height / 2) * math.ceil(width / 2) * (before // 2)
        macs = {"stem": 27.0 * half + tokens * 9 * before * (before // 2)}
        macs["norms"] = float(norm * (half + tokens * before))
        macs |= dict.fromkeys(("stage embedding", "aggregation", "attention", "MLP"), 0.0)
        for tokens, dim, depth, ratio in zip(self._tokens(), dims, depths, ratios, strict=True):
            macs["stage embedding"] += tokens * (9 * before + before * dim)
            macs["norms"] += norm * tokens * dim
            for part, count in _block_macs(dim, int(dim * ratio), norm).items():
                macs[part] += depth * tokens * count
            before = dim
        macs["norms"] += norm * tokens * before
        return Cost(macs | {"head": float(before * full.classes)})

    def _tokens(self) -> Iterator[int]:
        """Count the tokens of each stage."""
        _, height, width = self.input.size
        for level in self.maps():
            yield math.ceil(height / level.stride) * math.ceil(width / level.stride)


def _block_macs(dim: int, hidden: int, norm: int) -> dict[str, int]:
    """Count the work of a block for each token, by part; `norm` is that of a map's norm for each value."""
    segment = dim // SEGMENTS
    channels = (dim - segment) // HEADS
    groups = sum(segment * kernel**2 + segment**2 for kernel in KERNELS)
    near = sum(heads * kernel**2 for heads, kernel in zip(POSITION_HEADS, KERNELS, strict=True))
    return {
        "aggregation": 3 * groups + 27 * segment + 3 * segment**2,
        "attention": 9 * dim + 4 * dim**2 + 2 * HEADS * channels**2 + channels * near,
        "MLP": 2 * dim * hidden,
        # Two layer norms, four norms of maps of queries, keys and values, and that of the bypass.
        "norms": 2 * 5 * dim + 3 * norm * (dim - segment) + 5 * segment,
    }


ARCHITECTURE = GroupMixFormerArchitecture
