"""Semantic segmentation of pictures: any classifier's backbone, and a linear or UperNet head.

Backbones with maps of several sizes (groupmixformer) give these to the head, plain ViTs (image_vit, classifier) tokens.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from finetune.adapters.attach import apply_tuning
from finetune.detection.roi_head import feature_map
from finetune.held_out_sets import held_out_sets
from finetune.recipe import TuneRecipe
from finetune.segmentation.judged_pictures import SegmentationValidation, run_segmentation_test
from finetune.segmentation.mask_classes import CLASSES, class_names_of
from finetune.segmentation.mask_heads import LinearMaskHead, MaskHead, UperNetHead, head_cost
from finetune.segmentation.mask_objective import SegmentationObjective
from finetune.segmentation.mask_predictor import MaskPredictor
from finetune.segmentation.segmentation_checks import check_segmentation, segmentation_warnings
from finetune.task_checks import check_token_backbone
from finetune.tested_checkpoint import wants_test
from finetune.tuned import TunedObjective
from pretrain.data.samples import Batch
from pretrain.errors import RecipeError
from pretrain.models.base import Classifier, Cost, MapLevel
from pretrain.objectives.base import Method, Objective
from pretrain.runtime.process_group import Ranks
from pretrain.samples.picture_mask import MaskedPictures


@dataclass
class Config:
    """The head, its loss, and how pictures are judged."""

    name: str = "segmentation"
    """task: finetune/<name>/task.py"""
    head: Literal["linear", "upernet"] = "upernet"
    """linear: one linear layer of all maps; upernet: pyramid pooling and a pyramid of maps"""
    channels: int = 512
    """channels of upernet"""
    auxiliary: float = 0.4
    """weight of the loss of a small head on the last map but one; 0: none; upernet only"""
    judge: Literal["whole", "slide"] = "whole"
    """pictures are judged whole, or by windows of input.crop_size, whose scores are averaged where they overlap"""
    stride: int = 341
    """pixels from one window to the next"""


class SegmentationTask(Method):
    """Training of a model that tells the class of each pixel."""

    INPUT = "picture_mask"
    MODEL: ClassVar[type[Any]] = Classifier
    SECTIONS: ClassVar[tuple[str, ...]] = ("tune", "ema", "evaluate", "start")
    recipe: TuneRecipe

    def problems(self) -> list[str]:
        found = check_token_backbone(self.recipe, self.architecture, "masks", super().problems())
        if not found:
            self._levels()  # raises where there are no maps
        return found + check_segmentation(self.recipe)

    def warnings(self) -> list[str]:
        return segmentation_warnings(self.recipe)

    def samples(self) -> MaskedPictures:
        class_names_of(self.recipe)  # a list that does not fit the classes is told before the run
        if wants_test(self.recipe):
            held_out_sets(self.recipe, test=True)  # a wrong folder here ends a run that has trained
        return self._samples()

    def example(self, count: int) -> Batch:
        # Without reading classes: plan and doctor run where the shards are not.
        return self._samples().example(count)

    def _samples(self) -> MaskedPictures:
        return MaskedPictures(self.recipe.input, self.recipe.run.seed, self.recipe.model.classes)

    def build(self) -> SegmentationObjective:
        recompute: Any = self.recipe.compute.activation_checkpointing
        model: Any = self.architecture.build(recompute)
        # In the head's place: adapters train it, layers count it, and checkpoints name it as they do any other.
        model.head = self.build_head()
        apply_tuning(model, self.recipe.tune)
        return SegmentationObjective(model, self.recipe, self.architecture)

    def build_head(self) -> MaskHead:
        """Build the head for the backbone's maps."""
        options, classes = self.recipe.objective, self.recipe.model.classes
        if options.head == "linear":
            return LinearMaskHead(self._levels(), classes)
        return UperNetHead(self._levels(), classes, options.channels, options.auxiliary > 0)

    def cost(self) -> Cost:
        with torch.device("meta"):
            head = head_cost(self.build_head(), self._levels(), *self.recipe.input.size[1:])
        cost: Cost = self.architecture.cost()
        backbone = {name: count for name, count in cost.macs.items() if name != "head"}
        return Cost(backbone | head.macs, cost.tokens)

    def _levels(self) -> tuple[MapLevel, ...]:
        """Tell the maps that the head is given: the backbone's, or its tokens' one.

        Raises:
            RecipeError: tokens don't lie on a grid, or a picture is several steps of time to it.
        """
        if levels := self.architecture.maps():
            return tuple(levels)
        given = self.recipe.input
        grid = self.architecture.token_grid(*given.size)
        if grid.time != 1:
            raise RecipeError(f"input.frames: found {given.frames}, allowed: as many as the model takes in one step")
        return (MapLevel(self._channels, given.crop_size // grid.height),)

    @functools.cached_property
    def _channels(self) -> int:
        """Channels of the backbone's tokens, computed without memory."""
        size = self.recipe.input.size
        with torch.device("meta"), torch.no_grad():
            model = self.architecture.build()
            found = feature_map(model, torch.empty(1, *size, 3), self.architecture.token_grid(*size))
        return found.shape[1]

    def evaluation(self, ranks: Ranks) -> SegmentationValidation | None:
        if not any(source.val for source in self.recipe.data.sources.values()):
            return None
        return SegmentationValidation(self.recipe, ranks, self._samples())

    def test(self, ranks: Ranks, which: str | None = None) -> dict[str, float] | None:
        if which is None and not wants_test(self.recipe):
            return None
        return run_segmentation_test(self, self._samples(), ranks, which or self.recipe.evaluate.test)

    def predictor(self, objective: Any, source: Path) -> MaskPredictor:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return MaskPredictor(objective.to(device), device, self._samples(), class_names_of(self.recipe, source))

    def take_export(self, objective: Objective, source: Path) -> None:
        super().take_export(objective, source)
        assert isinstance(objective, TunedObjective), "what `build` made"
        # Exported weights are the evaluated ones; averages that still hold the first weights must not replace them.
        objective.average = None

    def describe(self, source: Path) -> dict[str, bytes]:
        return {CLASSES: "".join(f"{name}\n" for name in class_names_of(self.recipe, source)).encode()}


METHOD = SegmentationTask
