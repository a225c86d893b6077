"""A trained projector with its towers, asked for masks of free-text queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from finetune.open_vocabulary.text_masks import labels_of, sliding_masks
from pretrain.errors import DataError, RecipeError, WeightsError
from pretrain.models.tag_embeddings import FLOOR
from pretrain.objectives.contrast import normalized
from pretrain.objectives.tag_texts import SIMPLE, classes_by_templates
from pretrain.objectives.tagalign import TagAlignObjective
from pretrain.samples.box_transforms import resized_size
from pretrain.samples.text import Tokenizer
from pretrain.samples.transforms import resize
from pretrain.trained.load_run import load_trained

#: Most pixels of a judged picture's long side (official evaluation).
LONG_SIDE = 2048


@dataclass(frozen=True)
class SegmenterOptions:
    """How pictures are looked at; defaults are those of the published evaluation.

    Attributes:
        blend: share of CLIP's own masks; 1: CLIP surgery alone, 0: the projector alone.
        short_side: of judged pictures, pixels; None: twice the side of training pictures (448).
        window: side of the sliding window; None: the short side.
        stride: pixels between windows; None: half the window.
        templates: sentences about a class.
    """

    blend: float = 0.3
    short_side: int | None = None
    window: int | None = None
    stride: int | None = None
    templates: tuple[str, ...] = (SIMPLE,)


class TextSegmenter:
    """Masks of queries in pictures of any size.

    Args:
        objective: trained, in evaluation mode.
        input: the run's input section.
        device: to compute on.
        options: how pictures are looked at.

    Raises:
        RecipeError: options that can't work.
        WeightsError: a tower is missing.
    """

    def __init__(
        self, objective: TagAlignObjective, input: Any, device: torch.device, options: SegmenterOptions
    ) -> None:
        self._objective, self.device, self._options = objective.to(device), device, options
        self.short_side = 2 * input.height if options.short_side is None else options.short_side
        self._window = self.short_side if options.window is None else options.window
        self._stride = max(1, self._window // 2) if options.stride is None else options.stride
        patch = objective.model.options.clip.patch_size
        smallest = min(self.short_side, self._window, self._stride)
        # Pixels between windows would be seen by none of them.
        gaps = self._stride > self._window
        if smallest < 1 or gaps or (patch and min(self.short_side, self._window) < patch):
            sizes = f"--short-side {self.short_side}, --window {self._window}, --stride {self._stride}"
            raise RecipeError(
                f"{sizes}: allowed: at least a patch of {patch} pixels, and a stride from 1 to the window's side"
            )
        # Queries are refused where captions were cut: a user would not know which word is not looked for.
        self._tokenizer = Tokenizer(input.tokenizer, input.context, too_long="refuse")

    def classes(self, names: Sequence[str]) -> Tensor:
        """Embed queries, [K, E], normalised; other words for the same class may follow behind ";".

        Raises:
            DataError: none, or one that is empty.
            SampleError: one that is longer than the context.
        """
        if not names:
            raise DataError("no query; give --query, or a file with --class-names")
        tower = self._objective.texts.module(self.device)
        found = classes_by_templates(tower, self._tokenizer, names, self._options.templates, self.device)
        return normalized(found, FLOOR)

    def masks(self, picture: npt.NDArray[Any], classes: Tensor) -> Tensor:
        """Compute masks from 0 to 1 of a picture uint8 [H, W, 3], at the size that is judged: [K, h, w]."""
        height, width = picture.shape[:2]
        size = resized_size(width, height, self.short_side, max(LONG_SIDE, self.short_side), nearest=True)
        video = torch.from_numpy(resize(picture[None], *size))[None].to(self.device)
        image = self._objective.pixels(video)[0]
        tower = self._objective.images.module(self.device)
        return sliding_masks(
            tower, self._objective.model, image, classes, self._options.blend, self._window, self._stride
        )

    def labels(self, picture: npt.NDArray[Any], classes: Tensor, threshold: float | None) -> Tensor:
        """Find the class of each pixel, int64 [H, W]; see `labels_of`."""
        height, width = picture.shape[:2]
        return labels_of(self.masks(picture, classes), height, width, threshold)


def open_segmenter(weights: str, device: torch.device, options: SegmenterOptions) -> TextSegmenter:
    """Open a run, a checkpoint or an export of TagAlign; the towers are read from where its recipe says.

    Raises:
        WeightsError: of another method, or a tower is missing.
        CheckpointError: nothing is there.
    """
    trained = load_trained(weights)
    if not isinstance(trained.objective, TagAlignObjective):
        raise WeightsError(
            f"{weights}: objective {trained.recipe.objective.name} has no masks of texts; allowed: tagalign"
        )
    return TextSegmenter(trained.objective, trained.recipe.input, device, options)
