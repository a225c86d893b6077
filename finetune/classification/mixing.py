"""Mixup and CutMix of whole clips, by timm, drawn by position."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.recipe import Augment
from pretrain.data.randomness import key_of
from pretrain.runtime.compiler import uncompiled
from pretrain.runtime.vision_ops import ensure_torchvision

#: Entry of a micro-batch: a seed for each group of neighbouring clips that are mixed with each other.
MIX_SEEDS = "mix_seeds"
#: Neighbouring positions that share a draw, as officially the videos of one GPU do (2 to 16 in the scripts).
SHARED = 8


def mix_seeds(seed: int, places: Sequence[tuple[int, int]]) -> list[int]:
    """Draw the seeds of a micro-batch's groups from the run's seed and the (epoch, position) of each video.

    A group is two neighbouring videos, whatever the size of the micro-batch; one of an odd size is a group.
    """
    group = len(places) if len(places) % 2 else 2
    return [key_of(seed, epoch, position // SHARED, "mix") % 2**32 for epoch, position in places[::group]]


class Mixing:
    """Mixup and CutMix of groups of clips with their reverse, all clips of a group by one share (timm's mode "batch").

    Args:
        options: the recipe's section; its Mixup or CutMix must be on.
        classes: outputs.
        smoothing: share of a target that is spread over all classes; multi-label targets move towards a half.
        multi_label: targets are [B, classes] of 0 and 1 instead of class numbers.
    """

    def __init__(self, options: Augment, classes: int, smoothing: float, multi_label: bool = False) -> None:
        ensure_torchvision()
        from timm.data.mixup import Mixup

        self._mixup: Any = Mixup(
            mixup_alpha=options.mixup,
            cutmix_alpha=options.cutmix,
            prob=options.mix_probability,
            switch_prob=options.switch_probability,
            mode="batch",
            label_smoothing=smoothing,
            num_classes=classes,
            multi_label=multi_label,
        )

    # A compiled graph would be made anew for every seed.
    @uncompiled
    def __call__(self, video: Tensor, target: Tensor, seeds: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mix clips: float [B, T, H, W, 3] and soft targets [B, classes].

        timm cuts the last two axes: they must be rows and columns (VideoMAE before 2022-07 cut frames and rows).

        Args:
            video, target: of a micro-batch.
            seeds: of its groups, which are all of one size, an even number of clips; None, where nothing says which
                clips these are: all are one group, seeded by torch's CPU generator.
        """
        frames = video.shape[1]
        planes = video.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
        seeds = [int(torch.randint(2**31, ()))] if seeds is None else seeds
        groups = zip(planes.chunk(len(seeds)), target.chunk(len(seeds)), seeds, strict=True)
        mixed, soft = zip(*(self._mix(*group) for group in groups), strict=True)
        return torch.cat(mixed).unflatten(1, (frames, 3)).permute(0, 1, 3, 4, 2), torch.cat(soft)

    def _mix(self, planes: Tensor, target: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        # No checkpoint holds NumPy's global state: a resumed run would mix other clips.
        with numpy_seeded(seed):
            mixed: tuple[Tensor, Tensor] = self._mixup(planes, target)
        return mixed


@contextlib.contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which timm draws from, inside and leave it untouched outside."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
