"""Settings of the detector, what they fix, and what of them can't work (systems/evad.md section 2.6)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pretrain.models.cubes import Grid, grid_of, grid_problems
from pretrain.models.encoder import ENCODER_FIELDS, EncoderShape, fill, missing, size_problems
from pretrain.models.evad.context import ContextSizes
from pretrain.models.evad.localisation import LocalisationSizes
from pretrain.models.evad.pyramid import LEVELS
from pretrain.models.keep_rates import Reorganisation, keep_rates, rate_problems, token_counts

#: What a size fixes beside the encoder: stochastic depth and the decoder (section 2.6).
DECODERS: dict[str, dict[str, Any]] = {
    "base": {"drop_path": 0.1, "decoder_dim": 384, "decoder_depth": 6, "decoder_heads": 6},
    "large": {"drop_path": 0.2, "decoder_dim": 512, "decoder_depth": 12, "decoder_heads": 8},
}
DECODER_FIELDS = ("drop_path", "decoder_dim", "decoder_depth", "decoder_heads")
SIZE_FIELDS = (
    "tubelet", *ENCODER_FIELDS, "decoder_dim", "decoder_depth", "decoder_heads", "queries", "rcnn_heads", "query_dim",
    "query_heads", "query_hidden", "dynamic_dim", "pool_size", "action_pool_size", "action_hidden", "classes",
)  # fmt: skip


@dataclass
class Config:
    """A size, pruning, localisation and context decoder; null means: as the size has it."""

    name: str = "evad"
    """architecture: pretrain/models/<name>"""
    size: Literal["base", "large", "custom"] = "base"
    """published size; custom: every field below that is null must be given"""
    patch_size: int | None = None
    """side of a cube, pixels"""
    tubelet: int = 2
    """frames of a cube"""
    dim: int | None = None
    """channels of the encoder"""
    depth: int | None = None
    """blocks of the encoder"""
    heads: int | None = None
    """attention heads of the encoder"""
    mlp_ratio: float | None = None
    """hidden channels of an MLP = int(channels x mlp_ratio), of the decoder too"""
    classes: int = 80
    """actions"""
    drop_path: float | None = None
    """stochastic depth rate of the encoder's last block, rising linearly from 0"""
    norm_eps: float = 1e-6
    """epsilon of encoder's and decoder's layer norms; localisation has 1e-5"""
    pretrain_side: int = 224
    """side of the square clips that the encoder was pre-trained on, pixels: its table of positions"""
    positions: Literal["stretch", "official"] = "stretch"
    """stretch: the table for any other grid; official: only for grids of another number of tokens (a quirk)"""
    keep_rate: float = 0.7
    """share of tokens that each pruning block keeps, those of the keyframe among them; 1: nothing is dropped"""
    keyframe_weight: float = 1.0
    """how much the attention of the keyframe's queries counts for the scores (published: 4 with keep_rate 0.6)"""
    prune_blocks: list[int] | None = None
    """pruning blocks, counted from 0; null: a quarter, a half and three quarters of the depth, as published"""
    token_order: Literal["positional", "official"] = "positional"
    """positional: surviving tokens keep their places in the decoder; official: the released models' mix-up of those
    beside the keyframe, which their weights have learned"""
    fpn_blocks: list[int] | None = None
    """four blocks, counted from 0, whose keyframe tokens become the maps that boxes are pooled from; null: the last of
    each quarter of the depth"""
    queries: int = 100
    """proposals of a clip: persons that it can find at most"""
    rcnn_heads: int = 6
    """localisation heads, each of which refines the boxes"""
    query_dim: int = 256
    """channels of proposals and pyramid"""
    query_heads: int = 8
    """attention heads between proposals"""
    query_hidden: int = 2048
    """hidden channels of a localisation head"""
    dynamic_dim: int = 64
    """channels between the two layers whose weights come from a proposal"""
    pool_size: int = 7
    """bins along each side of a box, for localisation"""
    action_pool_size: int = 7
    """the same for actions"""
    decoder_dim: int | None = None
    """channels of the context decoder"""
    decoder_depth: int | None = None
    """blocks of the context decoder"""
    decoder_heads: int | None = None
    """attention heads of the context decoder"""
    decoder_drop_path: float = 0.1
    """stochastic depth rate of the decoder's last block"""
    action_hidden: int = 2048
    """hidden channels of each decoder block's classifier"""
    roi_extension: tuple[float, float] = (0.4, 0.2)
    """share of a box's width and height that it is extended by for pooling actions; published without pruning: 0, 0"""


def resolve(config: Config) -> Config:
    """Fill every null in from the size."""
    full: Config = fill(config, ENCODER_FIELDS)
    preset = DECODERS.get(config.size, {})
    full = replace(full, **{key: value for key, value in preset.items() if getattr(full, key) is None})
    if full.depth and full.fpn_blocks is None:
        full = replace(full, fpn_blocks=[full.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)])
    return full


def pruning_of(config: Config) -> Reorganisation:
    """Describe a configuration's pruning as token reorganisation."""
    return Reorganisation(config.keep_rate, "keyframe", config.keyframe_weight, config.prune_blocks, fuse=False)


def shape_of(config: Config) -> EncoderShape:
    """Compute the encoder's sizes of a configuration."""
    full = resolve(config)
    return EncoderShape(tubelet=full.tubelet, **{key: getattr(full, key) for key in ENCODER_FIELDS})


def check(config: Config, frames: int, height: int, width: int) -> list[str]:
    """List what keeps this model from being built for clips of frames x height x width."""
    full = resolve(config)
    if open_fields := missing(full, (*ENCODER_FIELDS, *DECODER_FIELDS)):
        return open_fields
    if too_small := size_problems(full, SIZE_FIELDS):
        return too_small
    shape, pruning = shape_of(config), rate_problems(pruning_of(full), shape_of(config).depth)
    problems = [
        f"model.{key}={getattr(full, key)}: a probability from 0 to below 1 is needed"
        for key in ("drop_path", "decoder_drop_path")
        if not 0 <= getattr(full, key) < 1
    ]
    problems += [
        f"model.{heads}={getattr(full, heads)}: does not divide model.{dim}={getattr(full, dim)}"
        for heads, dim in (("heads", "dim"), ("query_heads", "query_dim"), ("decoder_heads", "decoder_dim"))
        if getattr(full, dim) % getattr(full, heads)
    ]
    problems += [f"model.{'prune_' if problem.startswith('blocks') else ''}{problem}" for problem in pruning]
    problems += _block_problems(full.fpn_blocks or [], shape.depth)
    side = full.pretrain_side
    problems += [
        f"{problem} (model.pretrain_side)"
        for problem in grid_problems(frames, side, side, shape.tubelet, shape.patch_size)
    ]
    if wrong := grid_problems(frames, height, width, shape.tubelet, shape.patch_size):
        return problems + wrong
    grid = grid_of(frames, height, width, shape.tubelet, shape.patch_size)
    return problems + pyramid_problems(grid, shape) + ([] if pruning else _count_problems(full, grid, shape))


def _block_problems(chosen: Sequence[int], depth: int) -> list[str]:
    if len(chosen) == len(LEVELS) and [*chosen] == sorted(set(chosen)) and all(0 <= one < depth for one in chosen):
        return []
    allowed = f"{len(LEVELS)} different blocks of 0 to {depth - 1}, ascending"
    return [f"model.fpn_blocks: found {[*chosen]}, allowed: {allowed}"]


def pyramid_problems(grid: Grid, shape: EncoderShape) -> list[str]:
    """List what a grid lacks: a middle in time, and sides that the pyramid can halve."""
    problems = []
    if grid.time % 2:
        length, even = grid.time * shape.tubelet, 2 * shape.tubelet
        problems.append(f"input.frames={length}: a multiple of {even} is needed, twice model.tubelet")
    if grid.height % 2 or grid.width % 2:
        found, allowed = f"{grid.height * shape.patch_size} x {grid.width * shape.patch_size}", 2 * shape.patch_size
        problems.append(
            f"frames of {found} pixels: multiples of {allowed} are needed, twice model.patch_size (input.pad)"
        )
    return problems


def _count_problems(full: Config, grid: Grid, shape: EncoderShape) -> list[str]:
    left = token_counts(grid.tokens, keep_rates(pruning_of(full), shape.depth), fuse=False)[-1]
    if left > grid.slice:
        return []
    return [
        f"model.keep_rate={full.keep_rate}: {left} of {grid.tokens} tokens would be left, allowed: more than the "
        f"keyframe's {grid.slice}; raise it, or prune in fewer blocks (model.prune_blocks)"
    ]


def context_sizes(full: Config, shape: EncoderShape) -> ContextSizes:
    """Give the decoder's sizes of a filled configuration."""
    assert full.decoder_dim and full.decoder_depth and full.decoder_heads, "filled in by `resolve`"
    return ContextSizes(
        dim=full.decoder_dim,
        depth=full.decoder_depth,
        heads=full.decoder_heads,
        hidden=int(full.decoder_dim * shape.mlp_ratio),
        actions=full.classes,
        action_hidden=full.action_hidden,
        pool=full.action_pool_size,
        stride=shape.patch_size,
        extension=(full.roi_extension[0], full.roi_extension[1]),
        drop_path=full.decoder_drop_path,
        eps=full.norm_eps,
    )


def localisation_sizes(full: Config) -> LocalisationSizes:
    """Give a localisation head's sizes of a filled configuration."""
    assert full.patch_size, "filled in by `resolve`"
    return LocalisationSizes(
        full.query_dim, full.query_heads, full.query_hidden, full.dynamic_dim, full.pool_size, full.patch_size
    )
