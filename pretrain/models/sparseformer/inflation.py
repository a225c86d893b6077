"""An image SparseFormer's weights for clips, and for another number of tokens (systems/sparseformer.md, 6.2, 6.3, 9).

Weights go by our names (`sparseformer_weights.own_names`).
"""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.sparseformer.regions import as_tubes, first_regions, time_offsets

logger = logging.getLogger(__name__)

REGIONS, EMBEDDING = "initial_roi.weight", "initial_embedding.weight"
OFFSET_BIAS, OFFSET_WEIGHT = "roi_offset_bias", "roi_offset_module.1.weight"


def inflated(state: Mapping[str, Tensor], replicates: int, spread: bool = False) -> dict[str, Tensor]:
    """Give an image model's weights an axis of time.

    Tokens are repeated for slices of the clip, slice after slice; nothing moves in time at first. With one slice and
    one frame the answers are the image model's.

    Args:
        state: of an image model.
        replicates: slices.
        spread: points of a token begin at times spread over its tube, instead of all in its middle, where the
            normalisation of their spread is singular.
    """
    found = dict(state)
    found[REGIONS] = as_tubes(state[REGIONS], replicates)
    if len(state[EMBEDDING]) > 1:
        found[EMBEDDING] = state[EMBEDDING].repeat(replicates, 1)
    for key, value in state.items():
        if key.endswith(OFFSET_BIAS):
            offsets = value.unflatten(0, (-1, 2))
            times = time_offsets(len(offsets)) if spread else torch.zeros(len(offsets))
            found[key] = torch.cat((offsets, times[:, None].to(value.dtype)), dim=1).flatten()
        elif key.endswith(OFFSET_WEIGHT):
            found[key] = F.pad(value.unflatten(0, (-1, 2)), (0, 0, 0, 1)).flatten(0, 1)
        elif "roi_adjust_module." in key and len(value) == 4 and value.ndim == 2:
            # Rows (x, y, w, h) -> (x, y, t, w, h, l).
            found[key] = F.pad(value.unflatten(0, (2, 2)), (0, 0, 0, 1)).flatten(0, 1)
        elif key.endswith("pe_transition.1.weight"):
            # Of the times, which the image model knows nothing of.
            found[key.replace("pe_transition.1", "time_transition")] = torch.zeros_like(value)
    return found


def resampled(state: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Lay out another number of tokens: regions and embeddings of those on the square grid are interpolated on it.

    Tokens beyond the square look at the whole image, with the mean embedding of those that did.

    Args:
        state: of an image model.
        tokens: of the new one.
    """
    regions = state[REGIONS]
    old, new = math.isqrt(len(regions)), math.isqrt(tokens)
    logger.warning("initial regions and embeddings of %d tokens are interpolated for %d", len(regions), tokens)
    found = dict(state)
    for key in (REGIONS, EMBEDDING):
        table = state[key]
        if len(table) == 1:
            continue  # one embedding for all
        grid = table[: old**2].float().T.unflatten(1, (old, old))[None]
        grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=True)[0].flatten(1).T
        left = table[old**2 :].float() if len(table) > old**2 else _whole(key, table)
        rest = left.mean(0, keepdim=True).expand(tokens - new**2, -1)
        found[key] = torch.cat((grid, rest)).to(table.dtype)
    return found


def _whole(key: str, table: Tensor) -> Tensor:
    """Rows for tokens that look at the whole image, where no token did."""
    return first_regions(2)[1:] if key == REGIONS else table.float()
