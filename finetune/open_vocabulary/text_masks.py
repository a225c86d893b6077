"""Masks of classes that are given as texts, of pictures of any size.

systems/tagalign.md, section 7: a class's mask is sigmoid(10 cos - 2.5) of its cosine with each patch, brought to the
picture's size; that of the projector is blended with that of CLIP's own patches. Larger pictures are looked at through
a sliding window, and masks, not cosines, are averaged where windows overlap. Shapes: B pictures, K classes, E channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.clip_surgery import SurgeryTower
from pretrain.models.patch_projector import PatchProjector
from pretrain.models.tag_embeddings import FLOOR

#: Factor on cosines and what is added, inside the sigmoid (official inference).
SHARPNESS, OFFSET = 10.0, -2.5


@torch.no_grad()
def blended_masks(
    tower: SurgeryTower, projector: PatchProjector, images: Tensor, classes: Tensor, blend: float
) -> Tensor:
    """Compute masks from 0 to 1 of images that are seen at once, float32 [B, K, H, W].

    Args:
        tower: frozen.
        projector: trained.
        images: normalised, [B, 3, H, W].
        classes: normalised embeddings [K, E].
        blend: share of CLIP's own masks; 1: CLIP surgery alone.
    """
    patches, grid = tower(images, class_token=False), tower.grid(*images.shape[2:])
    masks: Any = 0
    # A share of 0 is not computed: it would cost as much as the other.
    if blend < 1:
        masks = (1 - blend) * _masks(projector(patches, grid), classes)
    if blend > 0:
        masks = masks + blend * _masks(tower.forward_head(patches), classes)
    maps = masks.transpose(1, 2).unflatten(2, (grid.height, grid.width))
    return F.interpolate(maps, size=tuple(images.shape[2:]), mode="bilinear", align_corners=False)


def windows(length: int, window: int, stride: int) -> list[int]:
    """Give the first pixels of windows along a side; the last one ends with it, and overlaps more where it must."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride, length - window), 0) for number in range(count)]


def sliding_masks(
    tower: SurgeryTower, projector: PatchProjector, image: Tensor, classes: Tensor, blend: float, window: int,
    stride: int,
) -> Tensor:  # fmt: skip
    """Compute masks of an image of any size through windows, the mean where they overlap: float32 [K, H, W].

    Args:
        image: normalised, [3, H, W].
        window: side, pixels; a smaller side of the image is taken whole.
        stride: pixels from one window to the next.
    """
    height, width = image.shape[1:]
    total = image.new_zeros((len(classes), height, width), dtype=torch.float32)
    count = image.new_zeros((height, width), dtype=torch.float32)
    for y in windows(height, window, stride):
        for x in windows(width, window, stride):
            part = (slice(y, y + window), slice(x, x + window))
            total[(slice(None), *part)] += blended_masks(tower, projector, image[None, :, *part], classes, blend)[0]
            count[part] += 1
    return total / count


def labels_of(masks: Tensor, height: int, width: int, threshold: float | None) -> Tensor:
    """Bring masks [K, h, w] to a picture's size and take the class of each pixel, int64 [H, W].

    Args:
        masks: from 0 to 1.
        height, width: of the picture.
        threshold: mask of the background, which then is class 0 and the others follow; None: there is none.
    """
    maps = F.interpolate(masks[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    if threshold is not None:
        # Put in front after resizing: it is constant, and ties go to it.
        maps = torch.cat((maps.new_full((1, height, width), threshold), maps))
    return maps.argmax(0)


def _masks(embeddings: Tensor, classes: Tensor) -> Tensor:
    cosines = F.normalize(embeddings.float(), dim=-1, eps=FLOOR) @ classes.t()
    return (cosines * SHARPNESS + OFFSET).sigmoid()
