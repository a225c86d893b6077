"""Mixup and CutMix of whole clips, by timm, reproducible step by step."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.recipe import Augment
from pretrain.runtime.vision_ops import ensure_torchvision


class Mixing:
    """Mixup and CutMix of a batch with its reverse, all clips by the same share (timm's mode "batch").

    Draws follow torch's CPU generator, which the engine seeds before every forward pass from (seed, step, micro-batch,
    rank): a resumed run mixes as the uninterrupted one.

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

    def __call__(self, video: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix clips: float [B, T, H, W, 3] and soft targets [B, classes]; B even.

        timm cuts the last two axes: they must be rows and columns (VideoMAE before 2022-07 cut frames and rows).
        """
        frames = video.shape[1]
        planes = video.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
        # No checkpoint holds NumPy's global state: a resumed run would mix other clips.
        with numpy_seeded(int(torch.randint(2**31, ()))):
            mixed, soft = self._mixup(planes, target)
        return mixed.unflatten(1, (frames, 3)).permute(0, 1, 3, 4, 2), soft


@contextlib.contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which timm draws from, inside and leave it untouched outside."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
