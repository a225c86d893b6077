"""Suppression of boxes and RoIAlign from tensors alone, for where torchvision's compiled operators are not there.

Both follow torchvision's: suppression keeps boxes that overlap by exactly the threshold; RoIAlign (He et al., Mask
R-CNN, section 3) has the border rule of Detectron's kernel, by which samples outside the map count as zeros in the mean
and those within a pixel of it take the border.
"""

import torch
from torch import Tensor

from pretrain.runtime.tensors import has_content

#: Values of an intermediate result at most; more boxes are pooled part by part.
VALUES_AT_ONCE = 50_000_000
#: Boxes whose overlaps with one another are held at once.
BOXES_AT_ONCE = 2048


def suppress_by_tensors(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Keep the best box of each heap: greedy non-maximum suppression.

    Args:
        boxes: x1, y1, x2, y2 [N, 4].
        scores: [N]; of equal ones the earlier goes first.
        threshold: a box that overlaps a better, kept one by more is dropped; boxes that are no numbers overlap none.

    Returns:
        Numbers of the kept boxes by falling score, int64 [n].
    """
    order = scores.sort(descending=True, stable=True).indices
    kept = order[:0]
    for part in order.split(BOXES_AT_ONCE):
        left = part[~_overlap(boxes[kept], boxes[part], threshold).any(0)] if len(kept) else part
        kept = torch.cat((kept, left[_kept_of(_overlap(boxes[left], boxes[left], threshold).triu(1))]))
    return kept


def _kept_of(over: Tensor) -> Tensor:
    """Solve "kept unless a kept box before it overlaps it", bool [n], by repetition until nothing changes.

    What the first k boxes decide is right after k rounds; most heaps are settled after three or four.
    """
    kept = over.new_ones(len(over))
    while True:
        changed = ~(over & kept[:, None]).any(0)
        if torch.equal(changed, kept):
            return kept
        kept = changed


def _overlap(first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """Tell which boxes [n, 4] and [m, 4] overlap by more, bool [n, m]."""
    areas = [(one[:, 2] - one[:, 0]) * (one[:, 3] - one[:, 1]) for one in (first, second)]
    # Axis by axis: a last dimension of two costs three times as much.
    across, down = (
        (torch.minimum(first[:, None, axis + 2], second[:, axis + 2])
         - torch.maximum(first[:, None, axis], second[:, axis])).clamp_(min=0)
        for axis in (0, 1)
    )  # fmt: skip
    common = across.mul_(down)
    # Divided and not multiplied out: rounded otherwise, boxes at the very threshold would go where compiled ones stay.
    return common / (areas[0][:, None] + areas[1] - common) > threshold


def roi_align_by_tensors(
    features: Tensor, boxes: Tensor, images: Tensor, size: int | tuple[int, int], scale: float, samples: int = 0,
    aligned: bool = False, within: bool = False,
) -> Tensor:  # fmt: skip
    """Pool as `pretrain.models.roi_align.roi_align` does; `size` may name rows and columns of bins."""
    down, across = (size, size) if isinstance(size, int) else size
    if not len(boxes):
        # Still in the graph: a map on which no box falls gets zero gradients, not missing ones.
        return features.new_zeros(0, features.shape[1], down, across) + features.sum() * 0
    # Coordinates in float32 at least: half types can't tell neighbouring pixels of a large picture apart.
    exact = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)) * scale
    start = exact[:, :2] - (0.5 if aligned else 0.0)
    sides = exact[:, 2:] - exact[:, :2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    height, width = features.shape[-2:]
    rows = _axis(start[:, 1], sides[:, 1], down, samples, height, within).to(features.dtype)
    columns = _axis(start[:, 0], sides[:, 0], across, samples, width, within).to(features.dtype)
    window = _window(start, sides, height, width)
    each = max(1, VALUES_AT_ONCE // (features.shape[1] * (down * width if window is None else window[1] * window[2])))
    pooled = features.new_zeros(len(boxes), features.shape[1], down, across)
    for image, one in enumerate(features.permute(0, 2, 3, 1)):
        for chosen in _boxes_of(images, image).split(each):
            if window is None:
                part = _pooled(one, rows[chosen], columns[chosen])
            else:
                part = _pooled_inside(one, rows[chosen], columns[chosen], window[0][chosen], window[1:])
            pooled = pooled.index_copy(0, chosen, part)
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


def _window(start: Tensor, sides: Tensor, height: int, width: int) -> tuple[Tensor, int, int] | None:
    """Find windows of one size in which the boxes lie: corners int64 [N, 2] (y, x), rows, columns; None: too large.

    On the large map of a pyramid the boxes are small: products with all of it would be zeros for the most part.
    """
    if not has_content(start):
        return None
    # A pixel on either side: what samples between two pixels read.
    most = sides.amax(0).clamp(min=0).ceil().to(torch.int64) + 3
    rows, columns = min(int(most[1]), height), min(int(most[0]), width)
    if 4 * rows * columns > height * width:
        return None
    corner = (start.floor() - 1).to(torch.int64).flip(1).clamp(min=0)
    return torch.minimum(corner, corner.new_tensor([height - rows, width - columns])), rows, columns


def _pooled(picture: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pool boxes [n] of a map [H, W, C] to [n, C, P, Q], by products of matrices.

    Reading four pixels a sample takes a hundred times as long where channels are many, and keeps them all for the
    backward pass.
    """
    across = (rows.flatten(0, 1) @ picture.flatten(1)).unflatten(0, rows.shape[:2]).unflatten(2, picture.shape[1:])
    return (columns[:, None] @ across).permute(0, 3, 1, 2)


def _pooled_inside(
    picture: Tensor, rows: Tensor, columns: Tensor, corners: Tensor, window: tuple[int, int]
) -> Tensor:
    """Pool as `_pooled`, from a window around each box."""
    down, across = (corners[:, axis, None] + torch.arange(window[axis], device=corners.device) for axis in (0, 1))
    parts = picture[down[:, :, None], across[:, None, :]]
    near_rows = rows.gather(2, down[:, None].expand(-1, rows.shape[1], -1))
    near_columns = columns.gather(2, across[:, None].expand(-1, columns.shape[1], -1))
    pooled = (near_rows @ parts.flatten(2)).unflatten(2, (window[1], -1))
    return (near_columns[:, None] @ pooled).permute(0, 3, 1, 2)
