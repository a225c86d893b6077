"""RoIAlign: a fixed grid of features for each box of a map (He et al., Mask R-CNN, section 3).

torchvision's operator where its compiled part loads, else the same sums from tensors; both follow the border rule of
Detectron's kernel: samples outside the map count as zeros in the mean, those within a pixel of it take the border.
"""

import functools

import torch
from torch import Tensor

from pretrain.runtime.tensors import has_content
from pretrain.runtime.vision_ops import ensure_torchvision

#: Values of an intermediate result at most; more boxes are pooled part by part.
VALUES_AT_ONCE = 50_000_000


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
    if compiled_operator():
        from torchvision.ops import roi_align as compiled

        rois = torch.cat((images[:, None].to(boxes.dtype), boxes), dim=1).to(features.dtype)
        pooled: Tensor = compiled(features, rois, size, scale, samples if samples > 0 else -1, aligned)
        return pooled
    return roi_align_by_tensors(features, boxes, images, size, scale, samples, aligned, within)


@functools.cache
def compiled_operator() -> bool:
    """Tell whether torchvision's compiled operator is there for this build of torch."""
    ensure_torchvision()
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::roi_align", "CPU"))
    except RuntimeError:
        # No such operator: a torchvision built for CUDA beside a torch without it (runtime/vision_ops.py).
        return False


def roi_align_by_tensors(
    features: Tensor, boxes: Tensor, images: Tensor, size: int, scale: float, samples: int = 0, aligned: bool = False,
    within: bool = False,
) -> Tensor:  # fmt: skip
    """Pool as `roi_align` does, from tensors alone."""
    if not len(boxes):
        # Still in the graph: a map on which no box falls gets zero gradients, not missing ones.
        return features.new_zeros(0, features.shape[1], size, size) + features.sum() * 0
    # Coordinates in float32 at least: half types can't tell neighbouring pixels of a large picture apart.
    exact = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)) * scale
    start = exact[:, :2] - (0.5 if aligned else 0.0)
    sides = exact[:, 2:] - exact[:, :2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    height, width = features.shape[-2:]
    rows = _axis(start[:, 1], sides[:, 1], size, samples, height, within).to(features.dtype)
    columns = _axis(start[:, 0], sides[:, 0], size, samples, width, within).to(features.dtype)
    each = max(1, VALUES_AT_ONCE // (size * width * features.shape[1]))
    pooled = features.new_zeros(len(boxes), features.shape[1], size, size)
    for image, one in enumerate(features.permute(0, 2, 3, 1)):
        for chosen in _boxes_of(images, image).split(each):
            pooled = pooled.index_copy(0, chosen, _pooled(one, rows[chosen], columns[chosen]))
    return pooled


def _boxes_of(images: Tensor, image: int) -> Tensor:
    """List the boxes of a map, int64 [n]; of a plan's boxes, which have no content, all are of the first."""
    if has_content(images):
        return torch.nonzero(images == image)[:, 0]
    return torch.arange(0 if image else len(images), device=images.device)


def _axis(start: Tensor, side: Tensor, size: int, samples: int, length: int, within: bool) -> Tensor:
    """Compute with which weights the bins of each box read a map's rows (or columns), [N, P, length].

    Interpolation is separable, so an axis is done by itself, and the mean over a bin's samples is in the weights.
    """
    counts = (torch.full_like(side, samples) if samples > 0 else torch.ceil(side / size)).clamp(min=0)
    most = samples if samples > 0 else -(-length // size) if within else int(counts.max())
    grid = max(most, 1)
    bins = torch.arange(size, device=side.device, dtype=side.dtype)[None, :, None]
    steps = torch.arange(grid, device=side.device, dtype=side.dtype)[None, None, :]
    share = (side / size)[:, None, None]
    at = start[:, None, None] + bins * share + (steps + 0.5) * share / counts.clamp(min=1)[:, None, None]
    counted = (steps < counts[:, None, None]) & (at >= -1.0) & (at <= length)
    # Behind the last pixel's centre there is nothing to interpolate with: the sample is that pixel.
    distance = at.clamp(min=0.0, max=length - 1)[..., None] - torch.arange(length, device=at.device)
    weight = counted / counts.clamp(min=1)[:, None, None]
    return ((1 - distance.abs()).clamp(min=0) * weight[..., None]).sum(2)


def _pooled(picture: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pool boxes [n] of a map [H, W, C] to [n, C, P, P], by products of matrices.

    Reading four pixels a sample takes a hundred times as long where channels are many, and keeps them all for the
    backward pass.
    """
    across = (rows.flatten(0, 1) @ picture.flatten(1)).unflatten(0, rows.shape[:2]).unflatten(2, picture.shape[1:])
    return (columns[:, None] @ across).permute(0, 3, 1, 2)
