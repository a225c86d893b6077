"""Student and teacher side by side on held-out pictures: how alike they answer, and how often each is right."""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.data.held_out import HeldOut
from pretrain.data.samples import Samples
from pretrain.errors import DataError
from pretrain.metrics.ranking import accuracies, predicted
from pretrain.models import clip
from pretrain.objectives.zero_shot import (
    class_embeddings,
    class_names,
    sentences,
    similarities,
    text_tower,
    tokenizer_for,
)
from pretrain.recipe.schema import Recipe
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)


class Judged(NamedTuple):
    """Rows of one rank: their numbers in the set, labels, [n] similarity and loss, [n, K] scores of both."""

    numbers: list[int]
    labels: list[str]
    similarity: Tensor
    loss: Tensor
    student: Tensor
    teacher: Tensor


class BootstrapEvaluation:
    """Comparison for the engine, equal on all ranks.

    Metrics: `similarity`, the mean cosine of what the loss compares; `alignment`, the loss; with labels `top1`, `top5`
    of the student, `teacher_top1`, `teacher_top5`, and `agreement`, how often both say the same, in percent; top-5 of
    five classes or more.

    Args:
        recipe: the run, with objective.held_out.shards.
        samples: of the run.
        ranks: this process among all; the pictures are dealt out.

    Raises:
        DataError: the shards can't be read.
    """

    def __init__(self, recipe: Recipe, samples: Samples, ranks: Ranks) -> None:
        options = recipe.objective.held_out
        self.every_epochs: float = options.every_epochs
        self.best_by = "top1" if options.labels else "similarity"
        self._recipe, self._ranks, self._options = recipe, ranks, options
        self._pictures = HeldOut(
            "held out", options.shards, samples, ranks, options.micro, recipe.data.deadline_s, labelled=options.labels
        )
        names = options.zero_shot.class_names
        self._names = [] if names is None else class_names(names)
        self._classes: Tensor | None = None

    def __call__(self, objective: Any) -> dict[str, float]:
        """Compare. All ranks call it; `objective` is in evaluation mode.

        Raises:
            DataError: no picture can be read, or a label is no class.
        """
        if self._options.labels and self._names and self._classes is None:
            self._classes = self._read_classes()
        judged = [self._judge(objective, batch.rows, batch.numbers, batch.labels) for batch in self._pictures.batches()]
        # With sharded weights every rank takes part in every forward pass, also one that has fewer pictures.
        if self._recipe.zero.stage == 3:
            for _ in range(self._pictures.most_batches - len(judged)):
                self._judge(objective, self._pictures.blank(), [0], [""])
        return self._score([one for part in gather_objects(self._ranks, judged) for one in part])

    @torch.no_grad()
    def _judge(self, objective: Any, rows: dict[str, Any], numbers: list[int], labels: list[str]) -> Judged:
        answers = objective.answers(rows)
        loss, alike = objective.compared(answers)
        scores = [torch.zeros(len(numbers), 0)] * 2
        if self._options.labels:
            outputs = objective.model.forward_head(answers.features), objective.teacher_head(answers.teacher_features)
            scores = [self._scores(one).cpu() for one in outputs]
        rows_of = [one.reshape(len(numbers), -1).mean(1).cpu() for one in (alike, loss)]  # the mean over tokens
        return Judged(numbers, labels, *rows_of, *scores)

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs.float() if self._classes is None else similarities(outputs, self._classes)

    def _score(self, judged: list[Judged]) -> dict[str, float]:
        if not judged:
            raise DataError(f"objective.held_out.shards={self._pictures.url}: no picture can be read; see above")
        order = torch.tensor([number for one in judged for number in one.numbers]).argsort()  # as one rank has them
        alike, loss, student, teacher = (
            torch.cat([getattr(one, name) for one in judged])[order]
            for name in ("similarity", "loss", "student", "teacher")
        )
        found = {"similarity": alike.mean().item(), "alignment": loss.mean().item(), "pictures": float(len(order))}
        if not self._options.labels:
            return found
        labels = [label for one in judged for label in one.labels]
        targets = torch.tensor(self._targets(labels, student.shape[1]))[order]
        for name, scores in (("", student), ("teacher_", teacher)):
            found |= {f"{name}{metric}": value for metric, value in accuracies(scores, targets).items()}
        found["agreement"] = 100 * (predicted(student) == predicted(teacher)).float().mean().item()
        return found

    def _targets(self, labels: list[str], classes: int) -> list[int]:
        """Number the labels: names of classes, numbers, or as many other names as there are classes, in their order."""
        places = {name: number for number, name in enumerate(self._names)}
        others = sorted({label for label in labels if label not in places and not label.isdecimal()})
        if len(others) == classes:
            # As fine-tuning numbers the names of folders; ImageNet's, n01440764 and so on, are its classes in order.
            places = {name: number for number, name in enumerate(others)}
        found = [places.get(label, int(label) if label.isdecimal() else -1) for label in labels]
        if wrong := sorted({label for label, number in zip(labels, found, strict=True) if not 0 <= number < classes}):
            raise DataError(
                f"objective.held_out.shards={self._pictures.url}: {len(wrong)} labels are no class, {wrong[0]!r} for "
                f"example; allowed: 0 to {classes - 1}, the names in objective.held_out.zero_shot.class_names, or "
                f"{classes} other names, all of them there"
            )
        return found

    def _read_classes(self) -> Tensor:
        """Embed the classes, once: the text tower is not kept."""
        teacher, options = self._recipe.objective.teacher, self._options.zero_shot
        config: clip.Config = teacher.clip
        tower = text_tower(options, teacher.weights, config, teacher.dtype).module(self._ranks.device)
        texts = sentences(options.templates, self._names)
        found = class_embeddings(tower, tokenizer_for(options, config), texts, self._ranks.device)
        logger.info("zero-shot: %d classes, each of %d sentences", len(found), len(texts[0]))
        return found
