"""Action detection with given boxes: any classifier's tokens, pooled from each person's box, and its linear head.

The plain VideoMAE detector (systems/action_detection.md section 6, from MCG-NJU/VideoMAE-Action-Detection): boxes come
from the annotation in training, and from a person detector in the test.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from finetune.detection.actions import CLASSES, action_list, actions_of_weights
from finetune.detection.answers import Detections, answers_of
from finetune.detection.detection_checks import check_detection
from finetune.detection.final_test import run_detection_test
from finetune.detection.judging import DetectionValidation
from finetune.detection.losses import GROUP_WEIGHTS, LossName, binary_loss, grouped_focal_loss, softmax_loss
from finetune.detection.required_detections import require_detections
from finetune.detection.roi_head import clip_of_box, extend_boxes_inclusive, feature_map, pad_with_zeros, pool_boxes
from finetune.detection.video_answers import DetectionPredictor
from finetune.held_out_sets import held_out_sets
from finetune.recipe import TuneRecipe
from finetune.task_checks import check_token_backbone, held_out_warnings
from finetune.tested_checkpoint import wants_test
from finetune.tuned import TunedObjective, build_tuned
from pretrain.data.media import MEAN, STD
from pretrain.data.samples import Batch
from pretrain.errors import RecipeError
from pretrain.models.base import Classifier, Cost
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Method, Objective, Output
from pretrain.runtime.process_group import Ranks
from pretrain.samples.box_transforms import CONVENTIONS
from pretrain.samples.boxes import BoxSamples

#: Statistics of pixels by name (section 3.1), of red, green and blue in [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (tuple(MEAN), tuple(STD)),
    "slowfast": ((0.45,) * 3, (0.225,) * 3),
    "alphaction": ((122.7717 / 255, 115.9465 / 255, 102.9801 / 255), (57.375 / 255,) * 3),
}


@dataclass
class Config:
    """Persons' boxes, the loss of their actions, and the answer."""

    name: str = "detection"
    """task: finetune/<name>/task.py"""
    loss: LossName = "bce"
    """bce: each class by itself; softmax: one label a person (UCF101-24, JHMDB); focal: AlphAction's, one pose of 14,
    and 49 + 17 classes by themselves"""
    pixels: Literal["imagenet", "slowfast", "alphaction"] = "alphaction"
    """statistics that pixels are normalised by"""
    test_boxes: Literal["detections", "truth"] = "detections"
    """boxes that are judged: a person detector's (input.min_score), or those of the annotation"""
    extension: tuple[float, float] = (0.1, 0.05)
    """shares of width and height by which boxes grow for pooling in the test; negative: shrink"""
    detector_score: bool = True
    """multiply the score of a person's box into those of its actions"""
    metric: Literal["activitynet", "slowfast", "alphaction", "voc"] = "activitynet"
    """variant of frame-mAP that chooses the best step; the test reports AVA's three besides"""


class DetectionTask(Method):
    """Training of a detector of actions."""

    INPUT = "boxes"
    MODEL: ClassVar[type[Any]] = Classifier
    #: Whether the model finds the persons itself, so that predictions need no person detector.
    FINDS_PERSONS: ClassVar[bool] = False
    SECTIONS: ClassVar[tuple[str, ...]] = ("tune", "ema", "evaluate", "start")
    recipe: TuneRecipe

    def problems(self) -> list[str]:
        found = check_token_backbone(self.recipe, self.architecture, "boxes", super().problems())
        if not found:
            found = self._grid_problems()
        return found + check_detection(self.recipe)

    def _grid_problems(self) -> list[str]:
        """Say why tokens don't lie on a grid, of training clips or of whole frames, whatever sides these have."""
        given = self.recipe.input
        self.architecture.token_grid(*given.size)  # raises where there is none
        try:
            self.architecture.token_grid(given.frames, given.pad, given.pad)
        except RecipeError as error:
            # Training crops may fit by chance; the first validation, of whole frames, would end the run.
            return [f"input.pad: found {given.pad}, allowed: multiples of the model's patches ({error})"]
        return []

    def warnings(self) -> list[str]:
        return held_out_warnings(self.recipe)

    def samples(self) -> BoxSamples:
        # A class list that does not fit the model would otherwise be found out one refused sample at a time.
        action_list(self.recipe)
        samples = self._samples()
        # Wrong shards here would end a run that has trained.
        for test in (False, True) if wants_test(self.recipe) else (False,):
            if (sets := held_out_sets(self.recipe, test)) and samples.detected:
                require_detections(sets, samples, self.recipe.data.deadline_s)
        return samples

    def example(self, count: int) -> Batch:
        # Without reading classes: plan and doctor run where the shards are not.
        return self._samples().example(count)

    def _samples(self) -> BoxSamples:
        recipe = self.recipe
        detected = recipe.objective.test_boxes == "detections"
        return BoxSamples(recipe.input, recipe.run.seed, recipe.model.classes, detected)

    def build(self) -> "DetectionObjective":
        return DetectionObjective(build_tuned(self.architecture, self.recipe), self.recipe, self.architecture)

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        return cost

    def evaluation(self, ranks: Ranks) -> DetectionValidation | None:
        if not any(source.val for source in self.recipe.data.sources.values()):
            return None
        return DetectionValidation(self.recipe, ranks, self._samples())

    def test(self, ranks: Ranks, which: str | None = None) -> dict[str, float] | None:
        if which is None and not wants_test(self.recipe):
            return None
        return run_detection_test(self, self._samples(), ranks, which or self.recipe.evaluate.test)

    def predictor(self, objective: Any, source: Path) -> DetectionPredictor:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        actions = actions_of_weights(self.recipe, source)
        return DetectionPredictor(
            self._detect_of(objective.to(device)), device, self.recipe.input, actions, self.FINDS_PERSONS, str(source)
        )

    def _detect_of(self, objective: Any) -> Callable[[Batch], list[Detections]]:
        """Give what answers launch/predict.py for a batch."""
        detect: Callable[[Batch], list[Detections]] = objective.detect
        return detect

    def take_export(self, objective: Objective, source: Path) -> None:
        super().take_export(objective, source)
        assert isinstance(objective, TunedObjective), "what `build` made"
        # Exported weights are the evaluated ones; averages that still hold the first weights must not replace them.
        objective.average = None

    def describe(self, source: Path) -> dict[str, bytes]:
        return {CLASSES: action_list(self.recipe).to_json()}


METHOD = DetectionTask


class DetectionObjective(TunedObjective):
    """A classifier whose head judges boxes.

    A batch is of samples/boxes.py.

    Args:
        model: `forward_features` gives tokens, `forward_head` logits [N, K] of features [N, C].
        recipe: the run.
        architecture: of the model; it knows the layers and where tokens lie.
    """

    def __init__(self, model: Any, recipe: TuneRecipe, architecture: Classifier) -> None:
        super().__init__(model, recipe, architecture, PixelNormalization(*STATISTICS[recipe.objective.pixels]))

    def forward(self, batch: Batch) -> Output:
        logits = self.logits(batch, batch["boxes"])
        loss = self.loss(logits, batch["labels"])
        return Output(loss, {"boxes": batch["counts"].sum().float()})

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of boxes [N, K], summed over them."""
        name = self.recipe.objective.loss
        if name == "focal":
            return grouped_focal_loss(logits, labels, weights=GROUP_WEIGHTS)
        return softmax_loss(logits, labels) if name == "softmax" else binary_loss(logits, labels)

    def logits(self, batch: Batch, boxes: Tensor) -> Tensor:
        """Compute logits float32 [N, K] of boxes [N, 4], which lie inside their frames, as many as `counts` says."""
        features = self.maps(batch)
        clips = clip_of_box(batch["counts"], len(boxes))
        # Height alone: patches are square.
        pooled = pool_boxes(features.float(), boxes, clips, features.shape[2] / batch["video"].shape[2])
        # In float32: sigmoids of bfloat16 logits would be rounded to 8 bits.
        logits: Tensor = self.model.forward_head(pooled.to(features.dtype)).float()
        return logits

    def maps(self, batch: Batch) -> Tensor:
        """Compute the feature map of each clip, [B, C, h, w]."""
        grid = self.architecture.token_grid(*batch["video"].shape[1:4])
        return feature_map(self.model, self.clips(batch), grid)

    def clips(self, batch: Batch) -> Tensor:
        """Normalise the pixels of a batch, float32 [B, T, H, W, 3], with zeros where a clip ends before its batch."""
        return pad_with_zeros(self.normalization(unit_pixels(batch["video"])), batch["sizes"])

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Detections]:
        """Judge the boxes of a batch of judged clips, which lies on the model's device."""
        options, counts = self.recipe.objective, batch["counts"]
        sizes = batch["sizes"][clip_of_box(counts, len(batch["boxes"]))]
        # For pooling alone: what is reported is the box that was given.
        extended = extend_boxes_inclusive(batch["boxes"], options.extension, sizes)
        scores = self.probabilities(self.logits(batch, extended))
        if options.detector_score:
            scores = scores * batch["box_scores"][:, None]
        rules = CONVENTIONS[self.recipe.input.convention]
        return answers_of(batch, batch["boxes"].cpu().numpy(), scores.cpu().numpy(), counts.tolist(), rules)

    def detect_all(self, batches: Iterable[Batch]) -> list[Detections]:
        """Judge all keyframes that are this rank's; batches of judged clips on the model's device."""
        return [answer for batch in batches for answer in self.detect(batch)]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits [N, K] into probabilities."""
        name = self.recipe.objective.loss
        if name == "focal":
            poses, others = logits.split((14, logits.shape[1] - 14), 1)
            return torch.cat((poses.softmax(1), others.sigmoid()), dim=1)
        return logits.softmax(1) if name == "softmax" else logits.sigmoid()

    def take_start(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over an encoder, a classifier or a detector; a fine-tuned classifier's `fc_norm` has no place here."""
        load_pretrained(self.model, path, head=self.recipe.start.head, raw=raw, fresh_norm=True)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the clips as they are trained on."""
        return {"clips": batch["video"]}
