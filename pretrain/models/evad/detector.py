"""The detector: encoder with keyframe-centric pruning, pyramid, localisation heads, context refinement decoder.

Parameter names, sizes and numbers are official (MCG-NJU/EVAD; systems/evad.md sections 2 and 7).
"""

from collections.abc import Sequence

from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.backbone import layer_id
from pretrain.models.base import Cost, Detector
from pretrain.models.cubes import Grid, cut_cubes, grid_of
from pretrain.models.dropout import drop_path_rates
from pretrain.models.evad.context import ActorHead, ActorPredictions, placed
from pretrain.models.evad.detector_config import (
    Config,
    check,
    context_sizes,
    localisation_sizes,
    pruning_of,
    pyramid_problems,
    resolve,
    shape_of,
)
from pretrain.models.evad.detector_cost import context_macs, encoder_macs, localisation_macs, pyramid_macs
from pretrain.models.evad.grid_positions import GridPositions
from pretrain.models.evad.localisation import Proposals, absolute_boxes
from pretrain.models.evad.pyramid import LEVELS, PyramidConv, feature_pyramid, keyframe_maps
from pretrain.models.keep_rates import Reorganisation, keep_rates, token_counts
from pretrain.models.recompute import Recompute
from pretrain.models.token_reorganisation import TokenReorganisation, Tokens
from pretrain.models.vit import Block, CubeEmbedding


class EVAD(nn.Module):
    """Detector of persons and their actions.

    Args:
        config: model section of the recipe.
        frames, height, width: of a clip; heights and widths may differ from batch to batch, these are checked.
        activation_checkpointing: recompute each block of encoder and decoder in the backward pass.

    Attributes:
        reorganisation: drops tokens, see `prune`.

    Raises:
        RecipeError: the configuration can't be built for clips of this size.
    """

    def __init__(
        self, config: Config, frames: int, height: int, width: int, activation_checkpointing: Recompute = False
    ) -> None:
        if problems := check(config, frames, height, width):
            raise RecipeError(problems)
        super().__init__()
        full, shape = resolve(config), shape_of(config)
        self.config, self.shape, self.frames = full, shape, frames
        self.activation_checkpointing = activation_checkpointing
        self.patch_embed = CubeEmbedding(shape.dim, shape.tubelet, shape.patch_size)
        self.blocks = nn.ModuleList(
            Block(shape.dim, shape.heads, shape.hidden, full.norm_eps, drop_path=rate)
            for rate in drop_path_rates(full.drop_path or 0.0, shape.depth)
        )
        self.norm = nn.LayerNorm(shape.dim, eps=full.norm_eps)
        # By level and at the top, as files name them, not in a list.
        for level in LEVELS:
            self.add_module(f"fpn_lateral{level}", PyramidConv(shape.dim, full.query_dim, 1))
            self.add_module(f"fpn_output{level}", PyramidConv(full.query_dim, full.query_dim, 3, padding=1))
        self.init_proposal_boxes = Proposals(full.queries, 4, value=(0.5, 0.5, 1.0, 1.0))
        self.init_proposal_features = Proposals(full.queries, full.query_dim)
        source = grid_of(frames, full.pretrain_side, full.pretrain_side, shape.tubelet, shape.patch_size)
        self.positions = GridPositions(source, shape.dim, full.positions)
        context = context_sizes(full, shape)
        positions = GridPositions(source, context.dim, full.positions)
        self.det_head = ActorHead(
            shape.dim, full.rcnn_heads, localisation_sizes(full), context, positions, activation_checkpointing
        )
        self.prune(keep_rates(pruning_of(full), shape.depth), full.keyframe_weight)

    def prune(self, rates: Sequence[float], keyframe_weight: float = 1.0) -> None:
        """Drop tokens from now on at these rates, one for each block; 1 drops none.

        Args:
            rates: keep rate of each block.
            keyframe_weight: how much the attention of the keyframe's queries counts when tokens are scored.
        """
        config = Reorganisation(score="keyframe", keyframe_weight=keyframe_weight, fuse=False)
        in_order = self.config.token_order == "positional"
        self.reorganisation = TokenReorganisation(rates, "keyframe", config, in_order)

    def forward(self, video: Tensor, sizes: Tensor) -> ActorPredictions:
        """Find persons and tell their actions.

        Args:
            video: normalised pixels [B, T, H, W, 3], zeros where padded, H and W multiples of twice the patch; cast to
                the weights' type here.
            sizes: height and width of each clip's frames before padding, int64 [B, 2].
        """
        grid = self.grid_of(video)
        tokens = self.encode(video, grid)
        assert tokens.origin is not None, "keyframe-centric pruning tells where tokens come from"
        places = placed(tokens.origin, grid.slice, self.config.token_order == "official")
        proposals = absolute_boxes(self.init_proposal_boxes(), sizes), self.init_proposal_features()
        found: ActorPredictions = self.det_head(
            self.pyramid(tokens, grid), self.norm(tokens.x), places, grid, proposals, sizes
        )
        return found

    def encode(self, video: Tensor, grid: Grid) -> Tokens:
        """Compute the tokens behind the last block, the keyframe's first, and those of the pyramid's blocks."""
        cubes = cut_cubes(video, self.shape.tubelet, self.shape.patch_size)
        x = self.patch_embed(cubes.to(self.patch_embed.proj.weight.dtype))
        x = x + self.positions(grid, x)
        levels, recompute = self.config.fpn_blocks or (), self.activation_checkpointing
        return self.reorganisation.run(self.blocks, x, slices=grid.time, recompute=recompute, outputs=levels)

    def pyramid(self, tokens: Tokens, grid: Grid) -> list[Tensor]:
        """Compute p2 to p5 of the keyframe, [B, D, h, w]."""
        maps = keyframe_maps(tokens.outputs, grid.height, grid.width)
        lateral = [self.get_submodule(f"fpn_lateral{level}") for level in LEVELS]
        return feature_pyramid(maps, lateral, [self.get_submodule(f"fpn_output{level}") for level in LEVELS])

    def grid_of(self, video: Tensor) -> Grid:
        """Tell the token grid of clips [B, T, H, W, 3].

        Raises:
            RecipeError: the model can't take clips of this size.
        """
        frames, height, width = video.shape[1:4]
        # Another length would be given codes of other moments.
        if frames != self.frames:
            raise RecipeError(f"clips of {frames} frames for a model built for {self.frames} (input.frames)")
        grid = grid_of(frames, height, width, self.shape.tubelet, self.shape.patch_size)
        if problems := pyramid_problems(grid, self.shape):
            raise RecipeError(problems)
        return grid


class EVADArchitecture(Detector):
    """EVAD as a recipe describes it."""

    @staticmethod
    def resolve(config: Config) -> Config:
        return resolve(config)

    def problems(self) -> list[str]:
        return check(self.config, *self.input.size)

    def build(self, activation_checkpointing: Recompute = False) -> EVAD:
        frames, height, width = self.input.size
        return EVAD(self.config, frames, height, width, activation_checkpointing)

    def cost(self) -> Cost:
        frames, height, width = self.input.size
        shape = shape_of(self.config)
        return cost(self.config, grid_of(frames, height, width, shape.tubelet, shape.patch_size))

    def layer_of(self, name: str) -> tuple[int, int]:
        depth = shape_of(self.config).depth
        return layer_id(name, depth), depth + 1


ARCHITECTURE = EVADArchitecture


def cost(config: Config, grid: Grid) -> Cost:
    """Count the work of one clip's forward pass, by part, with the keep rate of the configuration."""
    full, shape = resolve(config), shape_of(config)
    rates, context = keep_rates(pruning_of(full), shape.depth), context_sizes(full, shape)
    left = token_counts(grid.tokens, rates, fuse=False)[-1]
    heads = full.rcnn_heads * localisation_macs(full.queries, localisation_sizes(full))
    macs = encoder_macs(grid, rates, shape) | context_macs(left, full.queries, shape.dim, context)
    macs |= {"pyramid": pyramid_macs(grid, shape.dim, full.query_dim), "localisation heads": heads}
    return Cost(macs, {"all": grid.tokens, "behind the encoder": left})
