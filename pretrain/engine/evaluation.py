"""Evaluation while training: when it is due, and which step has been best so far."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pretrain.engine.schedules import Schedule
from pretrain.recipe.components import objective_file
from pretrain.recipe.schema import Recipe
from pretrain.runtime.process_group import Ranks

logger = logging.getLogger(__name__)


class Evaluation(Protocol):
    """What a method's `evaluation(recipe, ranks)` returns."""

    #: Epochs between two evaluations; fractions find a best step within an epoch.
    every_epochs: float
    #: Metric whose largest value makes a step the best one.
    best_by: str

    def __call__(self, objective: Any) -> dict[str, float]:
        """Metrics by name, equal on all ranks. All ranks call it at the same step."""
        ...


@dataclass
class Best:
    """The best step so far; `value` is None before the first evaluation."""

    step: int = 0
    metric: str = ""
    value: float | None = None

    def consider(self, step: int, metric: str, value: float) -> bool:
        """Take note of an evaluation; whether it is the best so far. The first of equals stays."""
        if self.value is not None and not value > self.value:
            return False
        self.step, self.metric, self.value = step, metric, value
        return True

    @property
    def steps(self) -> set[int]:
        """Steps whose checkpoints have to stay."""
        return set() if self.value is None else {self.step}

    def write(self, path: Path) -> None:
        """Say in a file which step it is."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def open_evaluation(recipe: Recipe, ranks: Ranks) -> Evaluation | None:
    """The evaluation of the recipe's method, if it has one and the recipe asks for it."""
    method = objective_file(recipe)
    evaluation: Evaluation | None = method.evaluation(recipe, ranks) if hasattr(method, "evaluation") else None
    return evaluation


class Periodic(Protocol):
    """What is done every so many epochs."""

    every_epochs: float


def every_steps(evaluation: Periodic, schedule: Schedule) -> int:
    """Steps between two evaluations, or measures of health."""
    return max(1, round(evaluation.every_epochs * schedule.steps_per_epoch))
