"""Detection and instance segmentation of pictures: any classifier's backbone, and Mask R-CNN behind a pyramid of maps.

Backbones with maps of strides 4 to 32 (groupmixformer) are joined from the coarsest down, plain ViTs (image_vit,
classifier) give their tokens' one map, of which four are made. Torchvision's Mask R-CNN, COCO's data and scores.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from finetune.adapters.attach import apply_tuning
from finetune.coco.category_names import CATEGORIES, categories_of
from finetune.coco.feature_pyramids import pyramid_problems
from finetune.coco.instance_checks import check_instances, instance_warnings
from finetune.coco.instance_objective import InstanceObjective
from finetune.coco.instance_predictor import InstancePredictor
from finetune.coco.judged_instances import InstanceValidation, run_instance_test
from finetune.coco.mask_rcnn import MaskRCNN, detector_cost
from finetune.held_out_sets import held_out_sets
from finetune.picture_maps import map_levels
from finetune.recipe import TuneRecipe
from finetune.task_checks import check_token_backbone
from finetune.tested_checkpoint import wants_test
from finetune.tuned import TunedObjective
from pretrain.data.samples import Batch
from pretrain.models.base import Classifier, Cost, MapLevel
from pretrain.objectives.base import Method, Objective
from pretrain.runtime.process_group import Ranks
from pretrain.samples.instances import InstancePictures


@dataclass
class Config:
    """The detector; what is not here is torchvision's: NMS at 0.7 and 0.5, 256 anchors of a picture."""

    name: str = "coco"
    """task: finetune/<name>/task.py"""
    channels: int = 256
    """channels of the pyramid"""
    anchor: int = 32
    """side of the smallest anchors, pixels, on the map of stride 4; those of the next maps are twice as large each"""
    boxes: int = 512
    """boxes of a picture that the heads learn from, a quarter of them at most with a mask"""
    box_channels: int = 1024
    """hidden channels of the two layers that tell a box' class and place"""
    mask_channels: int = 256
    """channels of the four convolutions that tell a box' mask"""
    least_score: float = 0.05
    """least score of what is found"""
    most: int = 100
    """objects found in a picture at most"""


class CocoTask(Method):
    """Training of a model that finds the objects of pictures, with their classes and masks."""

    INPUT = "instances"
    MODEL: ClassVar[type[Any]] = Classifier
    SECTIONS: ClassVar[tuple[str, ...]] = ("tune", "ema", "evaluate", "start")
    recipe: TuneRecipe

    def problems(self) -> list[str]:
        found = check_token_backbone(self.recipe, self.architecture, "pyramids", super().problems())
        if not found:
            found += pyramid_problems(self._levels)
        return found + check_instances(self.recipe)

    def warnings(self) -> list[str]:
        return instance_warnings(self.recipe)

    def samples(self) -> InstancePictures:
        if wants_test(self.recipe):
            held_out_sets(self.recipe, test=True)  # a wrong folder here ends a run that has trained
        # A list that does not fit the classes is told before the run.
        return self._samples([one.name for one in categories_of(self.recipe)])

    def example(self, count: int) -> Batch:
        # Without reading classes: plan and doctor run where the files are not.
        return self._samples([str(number) for number in range(self.recipe.model.classes)]).example(count)

    def _samples(self, names: list[str]) -> InstancePictures:
        return InstancePictures(self.recipe.input, self.recipe.run.seed, names)

    def build(self) -> InstanceObjective:
        recompute: Any = self.recipe.compute.activation_checkpointing
        model: Any = self.architecture.build(recompute)
        # In the head's place: adapters train it, layers count it, and checkpoints name it as they do any other.
        model.head = self.build_head()
        apply_tuning(model, self.recipe.tune)
        return InstanceObjective(model, self.recipe, self.architecture)

    def build_head(self) -> MaskRCNN:
        """Build pyramid and detector for the backbone's maps."""
        return MaskRCNN(self._levels, self.recipe.model.classes, self.recipe.objective)

    def cost(self) -> Cost:
        with torch.device("meta"):
            boxes, (_, height, width) = self.recipe.objective.boxes, self.recipe.input.size
            head = detector_cost(self.build_head(), self._levels, height, width, boxes)
        cost: Cost = self.architecture.cost()
        backbone = {name: count for name, count in cost.macs.items() if name != "head"}
        return Cost(backbone | head.macs, cost.tokens)

    @functools.cached_property
    def _levels(self) -> tuple[MapLevel, ...]:
        return map_levels(self.architecture, self.recipe.input)

    def evaluation(self, ranks: Ranks) -> InstanceValidation | None:
        if not any(source.val for source in self.recipe.data.sources.values()):
            return None
        return InstanceValidation(self.recipe, ranks, self.samples())

    def test(self, ranks: Ranks, which: str | None = None) -> dict[str, float] | None:
        if which is None and not wants_test(self.recipe):
            return None
        return run_instance_test(self, self.samples(), ranks, which or self.recipe.evaluate.test)

    def predictor(self, objective: Any, source: Path) -> InstancePredictor:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        names = [one.name for one in categories_of(self.recipe, source)]
        return InstancePredictor(objective.to(device), device, self._samples(names), names)

    def take_export(self, objective: Objective, source: Path) -> None:
        super().take_export(objective, source)
        assert isinstance(objective, TunedObjective), "what `build` made"
        # Exported weights are the evaluated ones; averages that still hold the first weights must not replace them.
        objective.average = None

    def describe(self, source: Path) -> dict[str, bytes]:
        import json

        categories = [vars(one) for one in categories_of(self.recipe, source)]
        return {CATEGORIES: (json.dumps({"categories": categories}, indent=1) + "\n").encode()}


METHOD = CocoTask
