"""Distillation: a student learns the class probabilities that a frozen teacher gives to the same views.

Teacher and student see the same crop with the same mixing ("patient and consistent teacher", Beyer et al. 2022), as
VideoMAE V2 does for its ViT-S and ViT-B; its code was never released (systems/videomae.md section 8).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from finetune.classification import task as classification
from finetune.classification.mixing import MIX_SEEDS
from finetune.classification.task import ClassificationObjective, ClassificationTask, soft_cross_entropy
from finetune.distillation.teacher import FrozenTeacher, Teacher
from finetune.recipe import TuneRecipe
from pretrain.data.samples import Batch
from pretrain.metrics.ranking import predicted
from pretrain.models import classifier
from pretrain.models.base import Classifier
from pretrain.models.frozen import Frozen
from pretrain.objectives.base import Output
from pretrain.runtime.compiler import uncompiled


@dataclass
class Config(classification.Config):
    """The teacher, and the loss."""

    name: str = "distillation"
    """task: finetune/<name>/task.py"""
    temperature: float = 1.0
    """both sides' logits are divided by it; the divergence is multiplied by its square, which keeps gradients alike"""
    label_weight: float = 0.0
    """share of the labels' cross entropy in the loss; the rest is KL(teacher || student)"""
    cache: str | None = None
    """folder for the teacher's logits: they are computed once, for any number of students; null: none"""
    teacher: Teacher = field(default_factory=Teacher)
    """whose answers are learnt"""


class DistillationTask(ClassificationTask):
    """Training of a classifier by what a teacher says."""

    def problems(self) -> list[str]:
        recipe, options = self.recipe, self.recipe.objective
        problems = super().problems()
        if options.task != "single":
            problems.append(
                f"objective.task: found {options.task}, allowed: single (a teacher gives class probabilities)"
            )
        if options.temperature <= 0:
            problems.append(f"objective.temperature: found {options.temperature}, allowed: more than 0")
        if not 0 <= options.label_weight <= 1:
            problems.append(f"objective.label_weight: found {options.label_weight}, allowed: a share from 0 to 1")
        if options.cache is not None and "://" in options.cache:
            problems.append(f"objective.cache: found {options.cache}, allowed: a folder (records are written in place)")
        if options.teacher.model.classes != recipe.model.classes:
            problems.append(
                f"objective.teacher.model.classes: {options.teacher.model.classes}, but model.classes is "
                f"{recipe.model.classes}; teacher and student must have the same classes"
            )
        theirs = classifier.check(options.teacher.model, *recipe.input.size)
        return problems + [f"objective.teacher: {problem}" for problem in theirs]

    def warnings(self) -> list[str]:
        found, options = super().warnings(), self.recipe.objective
        if options.label_weight == 0 and options.smoothing != classification.Config().smoothing:
            found.append("objective.smoothing has no effect: objective.label_weight is 0, the loss has no labels")
        return found

    def build(self) -> "DistillationObjective":
        return DistillationObjective(self.build_model(), self.recipe, self.architecture)


METHOD = DistillationTask


class DistillationObjective(ClassificationObjective):
    """A classifier that learns from a teacher; `ClassificationObjective` in all else.

    A batch holds, besides the views and labels of classification, what names them: `epoch`, `position`, `view`, `key`.
    """

    def __init__(self, model: classifier.VideoClassifier, recipe: TuneRecipe, architecture: Classifier) -> None:
        super().__init__(model, recipe, architecture)
        self.teacher = FrozenTeacher(recipe)
        # Files, counters and a network that is built on the way are nothing for the compiler.
        self._wanted = uncompiled(self.teacher.logits)

    def forward(self, batch: Batch) -> Output:
        video, target = self._normalized(batch["video"]), batch["target"]
        if self.mixing is not None and self.training:
            video, soft = self.mixing(video, target, batch.get(MIX_SEEDS))
        else:
            soft = self._soft(target)
        # Of the mixed clips: the method is a teacher that sees exactly what the student sees.
        wanted = self._wanted(video, batch)
        logits = self.model(video).float()
        options = self.recipe.objective
        divergence = distillation_loss(logits, wanted, options.temperature)
        loss = divergence
        if options.label_weight > 0:
            loss = (1 - options.label_weight) * divergence + options.label_weight * soft_cross_entropy(logits, soft)
        agreement = (predicted(logits) == wanted.argmax(-1)).float().mean() * 100
        return Output(loss, {"divergence": divergence.detach(), "agreement": agreement})

    def frozen_parts(self) -> Mapping[str, Frozen[Any]]:
        return {"teacher": self.teacher}

    def before_step(self, step: int, steps_per_epoch: int, total: int) -> None:
        super().before_step(step, steps_per_epoch, total)
        self.teacher.before_step(step)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over clips, for logits [B, classes]."""
    given = F.log_softmax(student / temperature, dim=-1)
    wanted = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2
