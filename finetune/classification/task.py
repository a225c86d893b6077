"""Supervised training of a video classifier: one class, several classes, or values to regress.

Specification: systems/videomae.md section 8, from run_class_finetuning.py of OpenGVLab/VideoMAEv2.
"""

import contextlib
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.adapters.attach import apply_tuning, detach
from finetune.adapters.config import check as check_tuning
from finetune.classification.label_sources import label_report, source_rules
from finetune.classification.labels import Task
from finetune.classification.mixing import Mixing
from finetune.classification.recipe_checks import check_classification, classification_warnings
from finetune.classification.validation import Validation
from finetune.classification.views import TrainingViews
from finetune.recipe import TuneRecipe
from pretrain.models.averages import WeightAverage
from pretrain.models.classifier_weights import load_pretrained, read_label_map
from pretrain.models.cubes import Grid, grid_of
from pretrain.objectives.base import Batch, Objective, Output
from pretrain.objectives.videomae import PixelNormalization, unit_pixels
from pretrain.runtime.process_group import Ranks

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """What is predicted, and the loss."""

    name: str = "classification"
    """task: finetune/<name>/task.py"""
    task: Literal["single", "multi", "regression"] = "single"
    """single: one class a video; multi: any number of classes; regression: model.classes values"""
    smoothing: float = 0.1
    """share of a target that is spread over all classes"""
    regression_loss: Literal["l2", "smooth_l1"] = "l2"
    """loss of regression"""


def check(recipe: TuneRecipe) -> list[str]:
    """What in the recipe this task can't work with."""
    data = recipe.data
    problems: list[str] = _model_file(recipe).check(recipe.model, data.frames, data.height, data.width)
    return problems + check_tuning(recipe.tune) + check_classification(recipe)


def warnings(recipe: TuneRecipe) -> list[str]:
    """Options that have no effect, or that don't fit the data."""
    return classification_warnings(recipe)


def sample_views(recipe: TuneRecipe) -> TrainingViews:
    """What data workers make of a sample; tells how even the classes are."""
    rules = source_rules(recipe)
    for line in label_report(recipe, rules):
        logger.info(line)
    return TrainingViews(recipe, rules)


def evaluation(recipe: TuneRecipe, ranks: Ranks) -> Validation | None:
    """Validation while training; None where no source has validation shards."""
    if not any(source.val for source in recipe.data.sources.values()):
        return None
    return Validation(recipe, ranks)


def build(recipe: TuneRecipe) -> "ClassificationObjective":
    """The model of the recipe with the parts that are trained, and its loss."""
    return ClassificationObjective(build_model(recipe), recipe)


def build_model(recipe: TuneRecipe) -> Any:
    """The model of the recipe with the parts that are trained."""
    data = recipe.data
    model = _model_file(recipe).build(
        recipe.model, data.frames, data.height, data.width, recipe.compute.activation_checkpointing
    )
    apply_tuning(model, recipe.tune)
    return model


def cost(recipe: TuneRecipe) -> dict[str, float]:
    """Multiply-accumulates of one view's forward pass, by part."""
    parts: dict[str, float] = _model_file(recipe).cost(recipe.model, _grid(recipe))
    return parts


def tokens_per_clip(recipe: TuneRecipe) -> dict[str, int]:
    """Tokens of a clip."""
    return {"all": _grid(recipe).tokens}


def _model_file(recipe: TuneRecipe) -> Any:
    return importlib.import_module(f"pretrain.models.{recipe.model.name}")


def _grid(recipe: TuneRecipe) -> Grid:
    model, data = _model_file(recipe).resolve(recipe.model), recipe.data
    return grid_of(data.frames, data.height, data.width, model.tubelet, model.patch_size)


class ClassificationObjective(Objective):
    """A classifier with its loss, mixing, and averaged weights.

    A batch holds `video` uint8 [B, T, H, W, 3] and `target`: int64 [B] (single), float32 [B, classes] (multi,
    regression).

    Args:
        model: VideoClassifier or the like: forward(normalised video [B, T, H, W, 3]) -> logits [B, classes].
        recipe: the run.
    """

    def __init__(self, model: Any, recipe: TuneRecipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.normalization = PixelNormalization()
        options, augment = recipe.objective, recipe.augment
        self.task: Task = options.task
        self.smoothing = options.smoothing
        mixes = augment.mixup > 0 or augment.cutmix > 0
        classes = recipe.model.classes
        self.mixing = Mixing(augment, classes, self.smoothing, self.task == "multi") if mixes else None
        self.average = self._new_average()

    def forward(self, batch: Batch) -> Output:
        video, target = self._normalized(batch["video"]), batch["target"]
        if self.mixing is not None and self.training:
            video, soft = self.mixing(video, target)
            return Output(self._loss(self.model(video).float(), soft), {})
        logits = self.model(video).float()
        loss = self._loss(logits, self._soft(target))
        right = (logits.argmax(-1) == target).float().mean() * 100 if self.task == "single" else None
        return Output(loss, {} if right is None else {"top1": right})

    @torch.no_grad()
    def predict(self, video: Tensor) -> Tensor:
        """Logits float32 [B, classes] of clips uint8 [B, T, H, W, 3]."""
        logits: Tensor = self.model(self._normalized(video)).float()
        return logits

    @torch.no_grad()
    def features(self, video: Tensor, pooled: bool = True) -> Tensor:
        """Features float32 of clips uint8 [B, T, H, W, 3]: [B, C], or [B, N, C] of all tokens."""
        features: Tensor = self.model.forward_features(self._normalized(video), pooled=pooled).float()
        return features

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside of it the model has the weights that are evaluated: the averages where there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.applied(self.model)

    def lr_scale(self, name: str) -> float:
        """layer_decay ^ (depth + 1 - layer)."""
        depth = len(self.model.blocks)
        layer = _model_file(self.recipe).layer_id(name.removeprefix("model."), depth)
        return float(self.recipe.optim.layer_decay ** (depth + 1 - layer))

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over an encoder or a classifier, ours, official or Hugging Face's, with a report."""
        start = self.recipe.start
        label_map = None if start.label_map is None else read_label_map(start.label_map)
        detach(self.model)  # adapters are no part of a backbone's file
        load_pretrained(self.model, path, start.encoder_norm, start.head, label_map, raw)
        apply_tuning(self.model, self.recipe.tune)
        self.average = self._new_average()  # of what is trained now, from what was loaded

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        if self.model.reorganisation is not None:
            self.model.reorganisation.set_step(step, steps_per_epoch)

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.model)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The clips as the model is given them, before mixing."""
        return {"augmented": batch["video"]}

    def _new_average(self) -> WeightAverage | None:
        ema = self.recipe.ema
        return None if ema.decay is None else WeightAverage(self.model, ema.decay, ema.warmup)

    def _normalized(self, video: Tensor) -> Tensor:
        normalized: Tensor = self.normalization(unit_pixels(video))
        return normalized

    def _soft(self, target: Tensor) -> Tensor:
        """Targets as the loss takes them, smoothed where they are classes."""
        if self.task == "regression":
            return target
        if self.task == "multi":
            return target * (1 - self.smoothing) + 0.5 * self.smoothing
        classes = self.recipe.model.classes
        return F.one_hot(target, classes).float() * (1 - self.smoothing) + self.smoothing / classes

    def _loss(self, logits: Tensor, soft: Tensor) -> Tensor:
        if self.task == "single":
            return soft_cross_entropy(logits, soft)
        if self.task == "multi":
            return F.binary_cross_entropy_with_logits(logits, soft)
        loss = F.mse_loss if self.recipe.objective.regression_loss == "l2" else F.smooth_l1_loss
        return loss(logits, soft)


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, K] with target distributions [B, K]."""
    return torch.sum(-soft * F.log_softmax(logits, dim=-1), dim=-1).mean()
