"""Work of a detector's forward pass by part, with and without pruning."""

from collections.abc import Sequence

from pretrain.models.cubes import Grid
from pretrain.models.encoder import EncoderShape, attention_macs, mlp_macs
from pretrain.models.evad.context import ContextSizes
from pretrain.models.evad.localisation import LocalisationSizes
from pretrain.models.evad.pyramid import SCALES
from pretrain.models.keep_rates import token_counts


def encoder_macs(grid: Grid, rates: Sequence[float], shape: EncoderShape) -> dict[str, float]:
    """Count the encoder's multiply-accumulates with a keep rate for each block."""
    dim = shape.dim
    counts = token_counts(grid.tokens, rates, fuse=False)
    # Tokens are dropped between attention and MLP, so a pruning block's attention still sees all that enter.
    entering = [grid.tokens, *counts[:-1]]
    return {
        "cube embedding": float(grid.tokens * shape.cube * dim),
        "attention": float(sum(attention_macs(count, dim) for count in entering)),
        "MLP": float(sum(mlp_macs(count, dim, shape.hidden) for count in counts)),
    }


def pyramid_macs(grid: Grid, dim: int, out: int) -> float:
    """Count the convolutions of the pyramid."""
    cells = [grid.slice * scale**2 for scale in SCALES]
    return float(sum(cells) * (dim * out + 9 * out * out))


def localisation_macs(queries: int, sizes: LocalisationSizes) -> float:
    """Count one localisation head; pooling is no matrix product and not counted."""
    dim, bins = sizes.dim, sizes.pool**2
    attention = attention_macs(queries, dim)
    dynamic = dim * 2 * dim * sizes.dynamic + 2 * bins * dim * sizes.dynamic + bins * dim * dim
    towers = 4 * dim * dim + 6 * dim
    return float(attention + queries * (dynamic + 2 * dim * sizes.hidden + towers))


def context_macs(tokens: int, queries: int, encoder_dim: int, sizes: ContextSizes) -> dict[str, float]:
    """Count projection, decoder blocks and their classifiers, for `tokens` surviving ones."""
    count = tokens + queries
    classifier = queries * sizes.action_hidden * (sizes.dim + sizes.actions)
    return {
        "projection": float(tokens * encoder_dim * sizes.dim),
        "context decoder": float(
            sizes.depth * (attention_macs(count, sizes.dim) + mlp_macs(count, sizes.dim, sizes.hidden))
        ),
        "action heads": float(sizes.depth * classifier),
    }
