"""Encoder and decoder masks as token indices, drawn from a generator that belongs to the sample.

Tokens are numbered n = (t*H' + y)*W' + x. Index arrays instead of boolean maps: every sample of a batch has the same
count, and the device gathers without waiting for the host. Source: systems/videomae.md section 4.

Counts that the batch needs to be rectangular hold for every grid: a tube mask hides the same cells in all slices, and
each 2x2 cell of a running-cell map is reconstructed (1-ratio)*4 times in every slice. How many reconstructed tokens the
encoder did not see, the loss's divisor, is constant only where T' is a multiple of 4; else it varies by sample, which
the weights carry exactly. Leaving out the seen ones (`skip_visible`) is therefore refused where their number varies.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError

Index = npt.NDArray[np.int64]
DecoderMask = Literal["running_cell", "frame", "random", "none"]


@dataclass(frozen=True)
class MaskPlan:
    """Plan by which the clips of one token grid are masked.

    Args:
        time, height, width: token grid T', H', W'.
        ratio: share of spatial positions hidden from the encoder in all slices (tube).
        decoder: which hidden or seen tokens the decoder leaves out; `none` reconstructs exactly the hidden ones (V1).
        decoder_ratio: share of tokens left out by the decoder mask.
        skip_visible: leave out mask tokens at positions that the encoder sees; changes the published numbers.
    """

    time: int
    height: int
    width: int
    ratio: float = 0.9
    decoder: DecoderMask = "running_cell"
    decoder_ratio: float = 0.5
    skip_visible: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a clip, N."""
        return self.time * self.height * self.width

    @property
    def visible(self) -> int:
        """Tokens that the encoder sees."""
        return self.time * (self.height * self.width - hidden_positions(self.height * self.width, self.ratio))

    @property
    def targets(self) -> int:
        """Tokens that the decoder reconstructs, M."""
        if self.decoder == "none":
            return self.tokens - self.visible
        share = {
            "running_cell": self.tokens * (4 - _queue_ones(self.decoder_ratio)) // 4,
            "frame": self.tokens - int(self.decoder_ratio * self.time) * self.height * self.width,
            "random": self.tokens - int(self.decoder_ratio * self.tokens),
        }[self.decoder]
        # Tubes and whole slices meet evenly, and so do tubes and running cells over four slices.
        return share * (self.tokens - self.visible) // self.tokens if self.skip_visible else share

    def problems(self) -> list[str]:
        """Say what makes this plan impossible, in words for the recipe's author."""
        found = []
        cells = self.height * self.width
        if not 0 < hidden_positions(cells, self.ratio) < cells:
            found.append(
                f"objective.mask_ratio={self.ratio}: hides {hidden_positions(cells, self.ratio)} of {cells} positions; "
                "at least one must be hidden and one visible"
            )
        if self.decoder == "running_cell":
            found += _running_cell_problems(self.height, self.width, self.decoder_ratio)
        elif self.decoder != "none" and not 0 < self.decoder_ratio < 1:
            found.append(f"objective.decoder_mask_ratio={self.decoder_ratio}: between 0 and 1, or decoder_mask: none")
        elif self.decoder == "frame" and int(self.decoder_ratio * self.time) == 0:
            found.append(f"objective.decoder_mask_ratio={self.decoder_ratio}: leaves out none of {self.time} slices")
        varies = self.decoder == "random" or (self.decoder == "running_cell" and self.time % 4)
        if self.skip_visible and varies:
            found.append(
                f"objective.skip_visible_mask_tokens: with decoder_mask={self.decoder} and {self.time} time slices the "
                "number of tokens would differ between samples; use running_cell with a multiple of 4 slices, or frame"
            )
        return found


def hidden_positions(cells: int, ratio: float) -> int:
    """Count the spatial positions hidden by a tube mask: int(ratio x H'W'), rounded down as officially."""
    return int(ratio * cells)


def tube_visible(plan: MaskPlan, rng: np.random.Generator) -> Index:
    """Draw the tokens that the encoder sees, ascending: the same random positions in every slice."""
    cells = plan.height * plan.width
    kept = np.zeros(cells, dtype=bool)
    # A permutation and no draw for each cell: all samples of a batch must hide the same number.
    kept[rng.permutation(cells)[hidden_positions(cells, plan.ratio) :]] = True
    return (np.arange(plan.time)[:, None] * cells + np.flatnonzero(kept)).reshape(-1)


@functools.lru_cache(maxsize=8)
def running_cell_maps(time: int, height: int, width: int, ratio: float) -> npt.NDArray[np.uint8]:
    """Build the four running-cell masks [4, T', H'*W']; 1 = not reconstructed, first index = start of the queue.

    mask[s, t, y, x] = queue[(2*(y mod 2) + x mod 2 + s + t + 1) mod 4], queue = int(4*ratio) ones, then zeros.

    Raises:
        DataError: odd grid, or a ratio other than 0.25, 0.5, 0.75. (Official code builds a smaller map, silently.)
    """
    problems = _running_cell_problems(height, width, ratio)
    if problems:
        raise DataError("; ".join(problems))
    ones = _queue_ones(ratio)
    queue = np.array([1] * ones + [0] * (4 - ones), dtype=np.uint8)
    start, t, y, x = np.ogrid[:4, :time, :height, :width]
    maps: npt.NDArray[np.uint8] = queue[(2 * (y % 2) + x % 2 + start + t + 1) % 4]
    maps = maps.reshape(4, time, height * width)
    maps.setflags(write=False)  # shared by all callers
    return maps


def _running_cell_problems(height: int, width: int, ratio: float) -> list[str]:
    found = []
    if height % 2 or width % 2:
        found.append(
            f"token grid {height}x{width}: decoder_mask running_cell needs an even number of cubes along height and "
            "width; change input.height and input.width, or objective.decoder_mask"
        )
    if ratio not in (0.25, 0.5, 0.75):
        found.append(
            f"objective.decoder_mask_ratio={ratio}: running_cell can express 0.25, 0.5 and 0.75; for 0 use "
            "objective.decoder_mask: none"
        )
    return found


def _queue_ones(ratio: float) -> int:
    return int(4 * ratio)


def decoder_targets(plan: MaskPlan, visible: Index, rng: np.random.Generator) -> tuple[Index, npt.NDArray[np.float32]]:
    """Draw tokens to reconstruct, ascending, and their weight in the loss: 1 if the encoder did not see one, else 0."""
    hidden = np.ones(plan.tokens, dtype=bool)
    hidden[visible] = False
    kept = _reconstructed(plan, hidden, rng)
    if plan.skip_visible:
        kept = kept & hidden
    targets = np.flatnonzero(kept)
    if len(targets) != plan.targets:  # an uneven batch would fail later, far from the cause
        raise DataError(f"{len(targets)} tokens to reconstruct where {plan.targets} were planned: {plan}")
    return targets, hidden[targets].astype(np.float32)


def _reconstructed(plan: MaskPlan, hidden: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Tell which of the N tokens the decoder reconstructs."""
    if plan.decoder == "none":
        return hidden
    if plan.decoder == "running_cell":
        maps = running_cell_maps(plan.time, plan.height, plan.width, plan.decoder_ratio)
        return maps[rng.integers(4)].reshape(-1) == 0
    # Published only as ablations, without code: whole slices, or single tokens, drawn uniformly, floor(ratio x count).
    units = plan.time if plan.decoder == "frame" else plan.tokens
    kept = np.ones(units, dtype=bool)
    kept[rng.permutation(units)[: int(plan.decoder_ratio * units)]] = False
    return np.repeat(kept, plan.tokens // units)


def draw(
    plan: MaskPlan, encoder_rng: np.random.Generator, decoder_rng: np.random.Generator
) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.float32]]:
    """Draw the masks of one view: `visible` int64 [Nv], `targets` int64 [M], `weight` float32 [M]."""
    visible = tube_visible(plan, encoder_rng)
    targets, weight = decoder_targets(plan, visible, decoder_rng)
    return {"visible": visible, "targets": targets, "weight": weight}
