"""CycleACR: action detection by the cycle of actor and context, other persons, and a long-term memory.

Specification: systems/cycleacr.md (arXiv 2303.16118), from MCG-NJU/CycleACR. Boxes, losses and answers are those of
finetune/detection; the head takes the place of the backbone's.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from finetune.adapters.attach import apply_tuning, tuning_problems
from finetune.adapters.config import check as check_tuning
from finetune.cycleacr.config import Config
from finetune.cycleacr.head_checks import check_head
from finetune.cycleacr.maps import maps_shape
from finetune.cycleacr.objective import CycleACRObjective, MomentSamples
from finetune.detection.detection_checks import check_detection
from finetune.detection.task import DetectionTask
from pretrain.models.base import Architecture, Cost, MapsShape
from pretrain.models.cycleacr import CycleACRHead, HeadShape
from pretrain.models.interaction import block_macs
from pretrain.objectives.base import Method

__all__ = ["METHOD", "Config", "CycleACRTask"]


class CycleACRTask(DetectionTask):
    """Training of a backbone with CycleACR's head."""

    MODEL: ClassVar[type[Any]] = Architecture

    def problems(self) -> list[str]:
        found = Method.problems(self) + check_tuning(self.recipe.tune)
        if not found:
            with torch.device("meta"):
                model = self.architecture.build()
            found = tuning_problems(model, self.recipe.tune) if self.recipe.tune.method != "full" else []
            maps = self._maps(model)  # first: it refuses architectures that know no layers
            found += check_head(self.recipe, maps, self.architecture.layer_of("norm")[1])
        return found + check_detection(self.recipe)

    def _samples(self) -> MomentSamples:
        recipe = self.recipe
        detected = recipe.objective.test_boxes == "detections"
        return MomentSamples(recipe.input, recipe.run.seed, recipe.model.classes, detected)

    def build(self) -> CycleACRObjective:
        recompute: Any = self.recipe.compute.activation_checkpointing
        model: Any = self.architecture.build(recompute)
        # In the head's place: adapters train it, layers count it, and checkpoints name it as they do any other.
        model.head = CycleACRHead(self.head_shape(self._maps(model)))
        apply_tuning(model, self.recipe.tune)
        return CycleACRObjective(model, self.recipe, self.architecture)

    def head_shape(self, maps: MapsShape) -> HeadShape:
        """Size the head for a backbone's maps."""
        options, inputs = self.recipe.objective, sum(maps.channels)
        return HeadShape(
            inputs=inputs, times=maps.times[-1], scale=maps.scale, classes=self.recipe.model.classes, dim=options.dim,
            outputs=options.outputs or (inputs if options.fusion == "add" else options.dim), hidden=options.hidden,
            depth=options.depth, instance_depth=options.instance_depth, max_persons=options.max_persons,
            max_per_second=options.memory.max_per_second, seconds=options.memory.seconds,
            position_codes=options.position_codes, fusion=options.fusion, dropout=options.dropout,
        )  # fmt: skip

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        with torch.device("meta"):
            shape = self.head_shape(self._maps(self.architecture.build()))
        return Cost(cost.macs | {"head": head_macs(shape)}, cost.tokens)

    def _maps(self, model: nn.Module) -> MapsShape:
        return maps_shape(self.architecture, model, self.recipe.input.size)


METHOD = CycleACRTask


def head_macs(shape: HeadShape, persons: int = 1) -> float:
    """Count the head's multiply-accumulates for a clip with so many persons."""
    dim, keys, memory = shape.dim, 50, shape.seconds * shape.max_per_second
    reductions = shape.inputs * dim * (keys + shape.times) + 2 * dim * dim
    cycle = shape.depth * sum(
        block_macs(dim, dim, *sizes) for sizes in ((shape.times, keys), (1, shape.times), (1, keys))
    )
    widths: Iterable[int] = [*[dim] * (shape.instance_depth - 1), shape.outputs]
    instances = sum(block_macs(dim, dim, 1, shape.max_persons) + block_macs(dim, width, 1, memory) for width in widths)
    inputs = shape.inputs + (shape.outputs if shape.fusion == "concat" else 0)
    classifier = shape.hidden * (inputs + shape.hidden + shape.classes)
    return float(persons * (reductions + cycle + instances + classifier))
