"""Supervised training of a video classifier: one class, several classes, or values to regress.

Specification: systems/videomae.md section 8, from run_class_finetuning.py of OpenGVLab/VideoMAEv2.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.adapters.attach import tuning_problems
from finetune.adapters.config import check as check_tuning
from finetune.classification.exports import class_files, export_formats
from finetune.classification.fine_tuned import FineTuned, names_of
from finetune.classification.label_sources import label_report, source_rules
from finetune.classification.labels import Task
from finetune.classification.mixing import MIX_SEEDS, Mixing
from finetune.classification.motion_checks import motion_report
from finetune.classification.predictor import Predictor, predictor_of
from finetune.classification.recipe_checks import check_classification, classification_warnings
from finetune.classification.testing import run_test
from finetune.classification.validation import Validation, labelled, video_sets
from finetune.classification.views import SourceRules, TrainingViews
from finetune.recipe import TuneRecipe
from finetune.tested_checkpoint import wants_test
from finetune.tuned import TunedObjective, build_tuned
from pretrain.data.samples import Batch
from pretrain.metrics.ranking import predicted
from pretrain.models.base import Classifier, Cost
from pretrain.models.classifier_weights import classifier_state, load_pretrained, read_label_map
from pretrain.models.pixels import unit_pixels
from pretrain.models.weights import LoadReport, load_state, read_state
from pretrain.objectives.base import Export, Method, Objective, Output
from pretrain.runtime.process_group import Ranks

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Prediction and its loss."""

    name: str = "classification"
    """task: finetune/<name>/task.py"""
    task: Literal["single", "multi", "regression"] = "single"
    """single: one class a video; multi: any number of classes; regression: model.classes values"""
    smoothing: float = 0.1
    """share of a target that is spread over all classes"""
    regression_loss: Literal["l2", "smooth_l1"] = "l2"
    """loss of regression"""


class ClassificationTask(Method):
    """Training of a classifier."""

    INPUT = "augmented_clip"
    MODEL = Classifier
    SECTIONS = TuneRecipe.OPTIONAL
    recipe: TuneRecipe

    def problems(self) -> list[str]:
        found = super().problems() + check_tuning(self.recipe.tune)
        if not found and self.recipe.tune.method != "full":
            # By the module and not by a flag of its architecture: what adapters attach to is code. Takes no memory.
            with torch.device("meta"):
                found = tuning_problems(self.architecture.build(), self.recipe.tune)
        return found + self._model_problems() + check_classification(self.recipe)

    def _model_problems(self) -> list[str]:
        """List what the model can't do of what the recipe asks for."""
        recipe, name, found = self.recipe, self.recipe.model.name, []
        side = recipe.evaluate.crop_size
        if side is not None and not self.architecture.any_size and (side, side) != recipe.input.size[1:]:
            found.append(f"evaluate.crop_size: found {side}, allowed with model.name={name}: null, it was built for "
                         "input.height x input.width")  # fmt: skip
        if self.architecture.full_precision and recipe.compute.dtype != "fp32":
            found.append(f"compute.dtype: found {recipe.compute.dtype}, allowed with model.name={name}: fp32, its "
                         "batch norms' running statistics lose small steps in 16 bits")  # fmt: skip
        return found

    def warnings(self) -> list[str]:
        return classification_warnings(self.recipe)

    def samples(self) -> TrainingViews:
        rules, report = self._compared_with_data()
        for line in report:
            logger.info(line)
        return TrainingViews(self.recipe, rules)

    def data_report(self) -> list[str]:
        return self._compared_with_data()[1]

    def _compared_with_data(self) -> tuple[list[SourceRules], list[str]]:
        """Resolve the rules of the sources, whose labels are what the recipe says, and report on these data."""
        rules = source_rules(self.recipe)
        report = [*label_report(self.recipe, rules), *motion_report(self.recipe, rules)]
        if wants_test(self.recipe):
            # Validation opens its shards at the start by itself; a wrong folder or label here ends a trained run.
            labelled(video_sets(self.recipe, test=True, rules=rules))
        return rules, report

    def example(self, count: int) -> Batch:
        # Without rules, for which labels would be counted: plan and doctor run where the shards are not.
        return TrainingViews(self.recipe, []).example(count)

    def build(self) -> "ClassificationObjective":
        return ClassificationObjective(self.build_model(), self.recipe, self.architecture)

    def build_model(self) -> Any:
        """Build the model with the parts that are trained."""
        return build_tuned(self.architecture, self.recipe)

    def cost(self) -> Cost:
        return self.architecture.cost()

    def evaluation(self, ranks: Ranks) -> Validation | None:
        if not any(source.val for source in self.recipe.data.sources.values()):
            return None
        return Validation(self.recipe, ranks)

    def test(self, ranks: Ranks, which: str | None = None) -> dict[str, float] | None:
        if which is None and not wants_test(self.recipe):
            return None
        return run_test(self, ranks, which or self.recipe.evaluate.test)

    def predictor(self, objective: Objective, source: Path) -> Predictor:
        return predictor_of(FineTuned(self.recipe, objective, names_of(self.recipe, source), source))

    def take_export(self, objective: Objective, source: Path) -> None:
        assert isinstance(objective, ClassificationObjective), "what `build` made"
        state = classifier_state(read_state(str(source)))
        load_state(objective.model, state, LoadReport(str(source), "export"))
        # Exported weights are the evaluated ones; averages that still hold the first weights must not replace them.
        objective.average = None

    def exports(self, source: Path) -> dict[str, Export]:
        return export_formats(self.recipe, self.architecture, source, super().exports(source)["safetensors"])

    def describe(self, source: Path) -> dict[str, bytes]:
        return class_files(self.recipe, source)


METHOD = ClassificationTask


class ClassificationObjective(TunedObjective):
    """A classifier with its loss, mixing, and averaged weights.

    A batch holds `video` uint8 [B, T, H, W, 3] and `target`: int64 [B] (single), float32 [B, classes] (multi,
    regression).

    Args:
        model: VideoClassifier or the like: forward(normalised video [B, T, H, W, 3]) -> logits [B, classes].
        recipe: the run.
        architecture: of the model; it knows the layers.
    """

    def __init__(self, model: Any, recipe: TuneRecipe, architecture: Classifier) -> None:
        super().__init__(model, recipe, architecture)
        options, augment = recipe.objective, recipe.augment
        self.task: Task = options.task
        self.smoothing = options.smoothing
        mixes = augment.mixup > 0 or augment.cutmix > 0
        classes = recipe.model.classes
        self.mixing = Mixing(augment, classes, self.smoothing, self.task == "multi") if mixes else None

    def forward(self, batch: Batch) -> Output:
        video, target = self._normalized(batch["video"]), batch["target"]
        if self.mixing is not None and self.training:
            video, soft = self.mixing(video, target, batch.get(MIX_SEEDS))
            # No top-1: a mixed clip is of two classes.
            return Output(self._loss(self.model(video).float(), soft), {})
        # In float32: the softmax of bfloat16 logits would be rounded to 8 bits.
        logits = self.model(video).float()
        loss = self._loss(logits, self._soft(target))
        right = (predicted(logits) == target).float().mean() * 100 if self.task == "single" else None
        return Output(loss, {} if right is None else {"top1": right})

    @torch.no_grad()
    def predict(self, video: Tensor) -> Tensor:
        """Compute logits float32 [B, classes] of clips uint8 [B, T, H, W, 3]."""
        logits: Tensor = self.model(self._normalized(video)).float()
        return logits

    @torch.no_grad()
    def features(self, batch: Batch, pooled: bool = True) -> Tensor:
        """Compute features float32 of `video` uint8 [B, T, H, W, 3]: [B, C], or [B, N, C] of all tokens."""
        features: Tensor = self.model.forward_features(self._normalized(batch["video"]), pooled=pooled).float()
        return features

    def take_start(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over an encoder or a classifier."""
        start = self.recipe.start
        label_map = None if start.label_map is None else read_label_map(start.label_map)
        named = self.architecture.own_weights(raw)
        load_pretrained(self.model, path, start.encoder_norm, start.head, label_map, named)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the clips as the model is given them, before mixing; and where it looks, if it does not everywhere."""
        video = batch["video"]
        shown = {"augmented": video}
        if self.architecture.draws_looks:
            shown |= self.architecture.looks(self.model, video, self._normalized(video)).rows
        return shown

    def _normalized(self, video: Tensor) -> Tensor:
        normalized: Tensor = self.normalization(unit_pixels(video))
        return normalized

    def _soft(self, target: Tensor) -> Tensor:
        """Turn targets into what the loss takes, smoothed where they are classes."""
        if self.task == "regression":
            return target
        if self.task == "multi":
            # Towards a half: each class is a decision between yes and no by itself.
            return target * (1 - self.smoothing) + 0.5 * self.smoothing
        classes = self.recipe.model.classes
        # As timm smooths: the right class has its part of the share too.
        return F.one_hot(target, classes).float() * (1 - self.smoothing) + self.smoothing / classes

    def _loss(self, logits: Tensor, soft: Tensor) -> Tensor:
        if self.task == "single":
            return soft_cross_entropy(logits, soft)
        if self.task == "multi":
            return F.binary_cross_entropy_with_logits(logits, soft)
        loss = F.mse_loss if self.recipe.objective.regression_loss == "l2" else F.smooth_l1_loss
        return loss(logits, soft)


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """Compute the mean cross entropy of logits [B, K] with target distributions [B, K]."""
    return torch.sum(-soft * F.log_softmax(logits, dim=-1), dim=-1).mean()
