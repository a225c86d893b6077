"""Loss of segmented pictures, and the classes of a picture's pixels, looked at whole or window by window."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.picture_maps import freeze_behind_maps, picture_maps
from finetune.recipe import TuneRecipe
from finetune.segmentation.mask_heads import resized
from finetune.tuned import TunedObjective
from pretrain.data.samples import Batch
from pretrain.metrics.segmentation import NO_CLASS
from pretrain.models.base import Classifier
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.pixels import unit_pixels
from pretrain.objectives.base import Output


class SegmentationObjective(TunedObjective):
    """A backbone whose head scores the classes of each pixel.

    A batch is of samples/picture_mask.py.

    Args:
        model: a classifier's module, with a `MaskHead` in its head's place.
        recipe: the run.
        architecture: of the model; it knows the layers, and where maps or tokens lie.
    """

    def __init__(self, model: Any, recipe: TuneRecipe, architecture: Classifier) -> None:
        super().__init__(model, recipe, architecture)
        # Heads have batch norms, and a rank has few pictures; where the backbone's are a rank's own, so are the head's.
        self.cross_rank_batch_norm = architecture.cross_rank_batch_norm is not False
        freeze_behind_maps(self.model, architecture)

    def forward(self, batch: Batch) -> Output:
        labels = batch["mask"].long()
        scores, aside = self.model.head(self.maps(self._normalized(batch["video"])))
        loss, scores = pixel_loss(scores, labels)
        if aside is not None:
            loss = loss + self.recipe.objective.auxiliary * pixel_loss(aside, labels)[0]
        labelled = labels != NO_CLASS
        right = (scores.argmax(1) == labels).sum() / labelled.sum().clamp(min=1) * 100
        return Output(loss, {"pixel_accuracy": right})

    def maps(self, video: Tensor) -> list[Tensor]:
        """Compute the backbone's maps of normalised pictures [B, 1, H, W, 3]: all of them, or its tokens' one."""
        return picture_maps(self.model, self.architecture, video, self.recipe.input.frames)

    @torch.no_grad()
    def segment(self, video: Tensor, height: int, width: int) -> Tensor:
        """Tell the classes of a picture's pixels, at the size at which it is asked for.

        Args:
            video: pictures at the size that is judged, uint8 [B, 1, H, W, 3].
            height: pixels of the answer.
            width: pixels of the answer.

        Returns:
            classes, int64 [B, height, width]; NO_CLASS where scores are not finite.
        """
        options, side = self.recipe.objective, self.recipe.input.crop_size
        pixels = self._normalized(video)
        if options.judge == "whole":
            scores = self._scores(pixels)
        else:
            scores = pixels.new_zeros(len(video), self.recipe.model.classes, *video.shape[2:4])
            seen = pixels.new_zeros(video.shape[2:4])
            for rows, columns in windows(video.shape[2], video.shape[3], side, options.stride):
                scores[:, :, rows, columns] += self._scores(pixels[:, :, rows, columns])
                seen[rows, columns] += 1
            scores /= seen
        scores = resized(scores, (height, width))
        return torch.where(scores.isfinite().all(1), scores.argmax(1), NO_CLASS)

    def passes(self, height: int, width: int) -> int:
        """Count the passes in which `segment` looks at a picture of this size."""
        options = self.recipe.objective
        if options.judge == "whole":
            return 1
        return sum(1 for _ in windows(height, width, self.recipe.input.crop_size, options.stride))

    @torch.no_grad()
    def idle(self, count: int) -> None:
        """Pass through the network so often on nothing, while other ranks look at larger pictures."""
        side = self.recipe.input.crop_size
        for _ in range(count):
            self._scores(next(self.parameters()).new_zeros(1, 1, side, side, 3))

    def take_start(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over an encoder, a classifier or a segmenter; a head of another kind or size is left out."""
        named = self.architecture.own_weights(raw)
        load_pretrained(self.model, path, head=self.recipe.start.head, raw=named, fresh_norm=True)

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        super().load_pretrained(path, raw)
        freeze_behind_maps(self.model, self.architecture)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the pictures as they are trained on, and their masks, a grey for each class."""
        step = 255 // self.recipe.model.classes or 1
        grey = ((batch["mask"].long() + 1) * step % 256).to(torch.uint8)
        return {"pictures": batch["video"], "masks": grey[:, None, :, :, None].expand(-1, -1, -1, -1, 3)}

    def _scores(self, pixels: Tensor) -> Tensor:
        """Score normalised pictures [B, 1, H, W, 3] of any size, float32 [B, K, H, W]."""
        height, width = pixels.shape[2:4]
        multiple = self._multiple()
        # Zeros, the mean of all pictures; what is scored of them is cut off again.
        filled = F.pad(pixels, (0, 0, 0, -width % multiple, 0, -height % multiple))
        scores, _ = self.model.head(self.maps(filled))
        return resized(scores.float(), filled.shape[2:4])[:, :, :height, :width]

    def _multiple(self) -> int:
        """Tell what sides of pictures must be multiples of."""
        if self.architecture.maps():
            return 1
        return int(self.recipe.input.crop_size // self.architecture.token_grid(*self.recipe.input.size).height)

    def _normalized(self, video: Tensor) -> Tensor:
        normalized: Tensor = self.normalization(unit_pixels(video))
        return normalized


def pixel_loss(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean cross entropy over labelled pixels, and the scores at their size.

    Args:
        scores: of maps [B, K, h, w].
        labels: int64 [B, H, W]; NO_CLASS counts nowhere.
    """
    # In float32: the softmax of bfloat16 scores would be rounded to 8 bits.
    scores = resized(scores.float(), labels.shape[1:])
    total = F.cross_entropy(scores, labels, ignore_index=NO_CLASS, reduction="sum")
    # Not the built-in mean, which is 0/0 where nothing is labelled, and one such batch would end the run.
    return total / (labels != NO_CLASS).sum().clamp(min=1), scores


def windows(height: int, width: int, side: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Lay square windows over a picture, the last of a row or column flush with its edge."""
    for top in _starts(height, side, stride):
        for left in _starts(width, side, stride):
            yield slice(top, top + side), slice(left, left + side)


def _starts(length: int, side: int, stride: int) -> list[int]:
    last = max(length - side, 0)
    return [min(start, last) for start in range(0, last + stride, stride)] if last else [0]
