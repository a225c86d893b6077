"""Mask R-CNN (He et al., arXiv 1703.06870) behind a pyramid: torchvision's parts, with draws that are the picture's.

torchvision's proposal network and heads are used as they are, with its names, weights and losses. What is ours beside
the pyramid: anchors and objects to learn from are drawn by the picture's place in the order, so that the number of
ranks changes nothing; and a map's scale is that of its stride, where torchvision guesses it from the first picture.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.coco.feature_pyramids import STRIDES, build_pyramid, meta_maps
from pretrain.data.randomness import key_of
from pretrain.models.base import Cost, MapLevel
from pretrain.models.dropout import drawn_numbers
from pretrain.runtime.vision_ops import ensure_torchvision

#: Names of the maps that boxes are pooled from, as torchvision's pyramid names them; the last is for proposals alone.
POOLED = ("0", "1", "2", "3")
RATIOS = (0.5, 1.0, 2.0)
#: Share of the boxes that are learned from which show an object at most, and have a mask then.
WITH_MASK = 0.25
#: Places along a side of a box whose class is told, and whose mask.
BOX_BINS, MASK_BINS = 7, 14
#: Convolutions in front of the masks.
MASK_LAYERS = 4

#: What is in a picture: boxes float32 [n, 4], labels int64 [n] from 1 on, masks uint8 [n, H, W].
Target = dict[str, Tensor]


class MaskRCNN(nn.Module):
    """Pyramid, proposals, and heads of boxes and masks; it stands where a classifier's head does.

    Args:
        levels: the backbone's maps, or its tokens' one.
        classes: K; the heads have one more, the ground, as class 0.
        options: section of the recipe, `finetune.coco.task.Config`.
    """

    def __init__(self, levels: Sequence[MapLevel], classes: int, options: Any) -> None:
        super().__init__()
        ensure_torchvision()
        from torchvision.models import detection
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.ops.poolers import initLevelMapper

        channels, hidden, wide = options.channels, options.box_channels, options.mask_channels
        self.pyramid = build_pyramid(levels, channels)
        sizes = tuple((options.anchor * 2**step,) for step in range(len(STRIDES) + 1))
        whole = detection.MaskRCNN(
            _Width(channels),
            rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
            box_score_thresh=options.least_score,
            box_detections_per_img=options.most,
            box_batch_size_per_image=options.boxes,
            box_positive_fraction=WITH_MASK,
            box_head=TwoMLPHead(channels * BOX_BINS**2, hidden),
            box_predictor=FastRCNNPredictor(hidden, classes + 1),
            mask_head=MaskRCNNHeads(channels, (wide,) * MASK_LAYERS, 1),
            mask_predictor=MaskRCNNPredictor(wide, wide, classes + 1),
        )
        self.rpn: Any = whole.rpn
        self.roi_heads: Any = whole.roi_heads
        self.sampling = [PositionSampler(self.rpn.fg_bg_sampler, "anchors"),
                         PositionSampler(self.roi_heads.fg_bg_sampler, "boxes")]  # fmt: skip
        self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler = self.sampling
        for pooler in (self.roi_heads.box_roi_pool, self.roi_heads.mask_roi_pool):
            # By stride: guessed from the first picture, as torchvision does, all later ones would have that one's.
            pooler.scales = [1 / stride for stride in STRIDES]
            first, last = (stride.bit_length() - 1 for stride in (STRIDES[0], STRIDES[-1]))
            # A box goes to the map on which it is about as large as one of 7 anchors on the coarsest but one.
            pooler.map_levels = initLevelMapper(first, last, canonical_scale=7 * options.anchor, canonical_level=4)

    def forward(
        self, maps: Sequence[Tensor], size: tuple[int, int], sizes: list[tuple[int, int]],
        targets: list[Target] | None = None, keys: Tensor | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:  # fmt: skip
        """Find objects, or in training compute losses.

        Args:
            maps: of the backbone.
            size: height and width of the batch, filled up to a multiple of 32.
            sizes: those of each picture in it.
            targets: what is in each picture; needed in training.
            keys: of the pictures, int64 [B], by which anchors and boxes are drawn; None: by torch's generator.

        Returns:
            `boxes`, `scores`, `labels` and `masks` [n, 1, 28, 28] of each picture, none in training; losses by name,
            none in evaluation.
        """
        from torchvision.models.detection.image_list import ImageList

        for sampler in self.sampling:
            sampler.keys = keys
        found = self.pyramid(maps)
        features = OrderedDict(zip((*POOLED, "pool"), found, strict=True))
        # Of the pictures torchvision's parts ask for the size alone.
        pictures = ImageList(found[0].new_empty(len(sizes), 0, *size), sizes)
        proposals, losses = self.rpn(pictures, features, targets)
        objects, others = self.roi_heads(features, proposals, sizes, targets)
        return objects, {**losses, **others}


class _Width(nn.Module):
    """Stand-in for a backbone, of which torchvision's constructor asks for the width alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels


class PositionSampler:
    """Choice of some examples of each picture, positive and negative, as torchvision's sampler has it.

    Args:
        like: torchvision's sampler, whose numbers it takes.
        purpose: word that tells its draws from others'.
    """

    keys: Tensor | None = None

    def __init__(self, like: Any, purpose: str) -> None:
        self.count, self.positive_share = like.batch_size_per_image, like.positive_fraction
        self._like, self._purpose = like, key_of(purpose) & (2**62 - 1)

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Mark the chosen positive (1 and above) and negative (0) ones of each picture, uint8 [n] both."""
        if self.keys is None:
            chosen: tuple[list[Tensor], list[Tensor]] = self._like(matched)
            return chosen
        # Uniform numbers stand in for a shuffled order: the smallest are taken.
        marks = [self._marked(one, drawn_numbers(key[None], self._purpose, len(one))[0])
                 for one, key in zip(matched, self.keys, strict=True)]  # fmt: skip
        return [one[0] for one in marks], [one[1] for one in marks]

    def _marked(self, matched: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.where(one)[0] for one in (matched >= 1, matched == 0))
        wanted = min(len(positive), int(self.count * self.positive_share))
        chosen = _smallest(positive, drawn, wanted), _smallest(negative, drawn, self.count - wanted)
        marks = [torch.zeros_like(matched, dtype=torch.uint8) for _ in chosen]
        for mark, rows in zip(marks, chosen, strict=True):
            mark[rows] = 1
        return marks[0], marks[1]


def _smallest(rows: Tensor, drawn: Tensor, count: int) -> Tensor:
    return rows[drawn[rows].sort(stable=True).indices[:count]]


def pasted_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Lay small masks [n, 1, 28, 28] over a picture at their boxes [n, 4], bool [n, H, W]: more than half is inside."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    if not len(masks):
        return torch.zeros(0, *size, dtype=torch.bool, device=masks.device)
    laid: Tensor = paste_masks_in_image(masks, boxes, size)[:, 0]
    return laid > 0.5


def detector_cost(head: MaskRCNN, levels: Sequence[MapLevel], height: int, width: int, boxes: int) -> Cost:
    """Count what a detector's layers multiply for a picture that it learns from; `head` lies on the meta device."""
    macs: dict[str, float] = {}
    with torch.no_grad():
        maps = _counted(macs, "pyramid", head, lambda: head.pyramid(meta_maps(levels, height, width)))
        _counted(macs, "proposals", head, lambda: head.rpn.head(maps))
        heads, channels = head.roi_heads, maps[0].shape[1]
        learned, masked = _boxes(boxes, channels, BOX_BINS), _boxes(int(boxes * WITH_MASK), channels, MASK_BINS)
        _counted(macs, "boxes", head, lambda: heads.box_predictor(heads.box_head(learned)))
        _counted(macs, "masks", head, lambda: heads.mask_predictor(heads.mask_head(masked)))
    return Cost(macs)


def _boxes(count: int, channels: int, bins: int) -> Tensor:
    return torch.empty(count, channels, bins, bins, device="meta")


def _counted(macs: dict[str, float], part: str, head: nn.Module, work: Callable[[], Any]) -> Any:
    """Run some work and add up what its layers multiply."""

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
        # All of its weight meets each place that a transposed convolution is given, and each that another one gives.
        given = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        macs[part] = macs.get(part, 0.0) + given.numel() / given.shape[1] * layer.weight.numel()

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    hooks = [layer.register_forward_hook(count) for layer in head.modules() if isinstance(layer, kinds)]
    found = work()
    for hook in hooks:
        hook.remove()
    return found


