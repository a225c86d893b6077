"""RoIAlign: a fixed grid of features for each box of a map (He et al., Mask R-CNN, section 3).

torchvision's operator where its compiled part loads, else the same sums from tensors (runtime/box_operators.py).
"""

import torch
from torch import Tensor

from pretrain.runtime.box_operators import roi_align_by_tensors
from pretrain.runtime.vision_ops import has_compiled_operators


def roi_align(
    features: Tensor, boxes: Tensor, images: Tensor, size: int, scale: float, samples: int = 0, aligned: bool = False,
    within: bool = False,
) -> Tensor:  # fmt: skip
    """Pool the features of boxes.

    Args:
        features: maps [B, C, H, W].
        boxes: x1, y1, x2, y2 in pixels of the pictures [N, 4]; they may reach over the border. What is pooled of boxes
            that are not finite is finite: whatever else depends on them has to tell.
        images: number of each box's map, int64 [N].
        size: bins along each side, P.
        scale: of the map, its side divided by the picture's.
        samples: along each side of a bin; 0: as many as the bin has map pixels, rounded up.
        aligned: shift by half a pixel, so that pixel centres lie at halves (SlowFast, EVAD); else boxes have a side of
            at least one map pixel (VideoMAE's detector, CycleACR).
        within: no box reaches over the border, so that the number of samples is known from the map's size: else it is
            looked up in the boxes where there is no compiled operator, which a plan's don't have.

    Returns:
        [N, C, P, P], of the features' type. Boxes get no gradient, as in torchvision.
    """
    # A place that is no number is looked up outside of the map: an error here, and on a GPU the end of the process.
    boxes = boxes.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if has_compiled_operators():
        from torchvision.ops import roi_align as compiled

        rois = torch.cat((images[:, None].to(boxes.dtype), boxes), dim=1).to(features.dtype)
        pooled: Tensor = compiled(features, rois, size, scale, samples if samples > 0 else -1, aligned)
        return pooled
    return roi_align_by_tensors(features, boxes, images, size, scale, samples, aligned, within)
