"""Losses of pictures with objects, and what is found in a picture: boxes, classes, masks at the picture's own size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune.coco.mask_rcnn import Target, pasted_masks
from finetune.detection.roi_head import pad_with_zeros
from finetune.picture_maps import freeze_behind_maps, picture_maps
from finetune.recipe import TuneRecipe
from finetune.tuned import TunedObjective
from pretrain.data.samples import Batch
from pretrain.models.base import Classifier
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.dropout import ROW_KEYS
from pretrain.models.pixels import unit_pixels
from pretrain.objectives.base import Output

#: Losses, as they are logged, by torchvision's names.
LOSSES = {
    "loss_objectness": "proposal_loss",
    "loss_rpn_box_reg": "proposal_box_loss",
    "loss_classifier": "class_loss",
    "loss_box_reg": "box_loss",
    "loss_mask": "mask_loss",
}


@dataclass(frozen=True)
class FoundObjects:
    """Objects of a picture, best first.

    Attributes:
        boxes: x1, y1, x2, y2 by the picture's pixels, float32 [n, 4].
        labels: classes from 0 on, int64 [n].
        scores: float32 [n].
        masks: bool [n, H, W].
    """

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_]


class InstanceObjective(TunedObjective):
    """A backbone whose head is a Mask R-CNN.

    A batch is of samples/instances.py.

    Args:
        model: a classifier's module, with a `MaskRCNN` in its head's place.
        recipe: the run.
        architecture: of the model; it knows the layers, and where maps or tokens lie.
    """

    def __init__(self, model: Any, recipe: TuneRecipe, architecture: Classifier) -> None:
        super().__init__(model, recipe, architecture)
        freeze_behind_maps(self.model, architecture)

    def forward(self, batch: Batch) -> Output:
        losses = self.losses(batch)
        named = {LOSSES[name]: loss.detach() for name, loss in losses.items()}
        return Output(torch.stack([*losses.values()]).sum(), named)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute torchvision's losses by its names; the objective's is their sum."""
        size, sizes = _sizes(batch)
        losses: dict[str, Tensor]
        _, losses = self.model.head(self._maps(batch), size, sizes, targets_of(batch), batch.get(ROW_KEYS))
        return losses

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[FoundObjects]:
        """Find the objects of judged pictures."""
        size, sizes = _sizes(batch)
        found, _ = self.model.head(self._maps(batch), size, sizes)
        originals = batch["originals"].tolist()
        return [
            _at_original(one, here, (int(height), int(width)))
            for one, here, (height, width) in zip(found, sizes, originals, strict=True)
        ]

    def take_start(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over an encoder, a classifier or a detector; a head of another kind or size is left out."""
        named = self.architecture.own_weights(raw)
        load_pretrained(self.model, path, head=self.recipe.start.head, raw=named, fresh_norm=True)

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        super().load_pretrained(path, raw)
        freeze_behind_maps(self.model, self.architecture)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the pictures as they are trained on, and the masks of what is in them, the later ones brighter."""
        masks = torch.zeros(batch["video"].shape[:4], dtype=torch.uint8, device=batch["video"].device)
        for row, target in enumerate(targets_of(batch)):
            for number, mask in enumerate(target["masks"], 1):
                masks[row, 0][mask.bool()] = 60 + 190 * number // max(len(target["masks"]), 1)
        return {"pictures": batch["video"], "masks": masks[..., None].expand(-1, -1, -1, -1, 3)}

    def _maps(self, batch: Batch) -> list[Tensor]:
        pixels = self.normalization(unit_pixels(batch["video"]))
        # Zeros behind the normalisation, the mean of all pictures.
        pixels = pad_with_zeros(pixels, batch["sizes"])
        return picture_maps(self.model, self.architecture, pixels, self.recipe.input.frames)


def _sizes(batch: Batch) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Give height and width of a batch, and of each picture in it."""
    height, width = batch["video"].shape[2:4]
    return (height, width), [(int(one), int(other)) for one, other in batch["sizes"].tolist()]


def targets_of(batch: Batch) -> list[Target]:
    """Split a batch's objects into those of each picture, as torchvision's parts take them: class 0 is the ground."""
    width = batch["video"].shape[3]
    parts = zip(*(batch[name].split(batch["counts"].tolist()) for name in ("boxes", "labels", "masks")), strict=True)
    return [{"boxes": boxes, "labels": labels + 1, "masks": spread_bits(masks, width)}
            for boxes, labels, masks in parts]  # fmt: skip


def spread_bits(masks: Tensor, width: int) -> Tensor:
    """Unpack masks uint8 [n, H, W / 8] on their device, uint8 [n, H, W] of 0 and 1; the highest bit comes first."""
    bits = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return ((masks[..., None] >> bits) & 1).flatten(2)[..., :width]


def _at_original(found: Target, size: tuple[int, int], original: tuple[int, int]) -> FoundObjects:
    """Bring boxes and masks to the original picture's pixels."""
    across, down = original[1] / size[1], original[0] / size[0]
    boxes = found["boxes"].float() * found["boxes"].new_tensor([across, down, across, down])
    masks = pasted_masks(found["masks"].float(), boxes, original)
    arrays = (boxes, found["labels"] - 1, found["scores"].float(), masks)
    return FoundObjects(*(one.cpu().numpy() for one in arrays))
