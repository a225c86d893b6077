"""Evaluation while training: its intervals, and the best step so far."""

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pretrain.engine.schedules import Schedule

logger = logging.getLogger(__name__)


@dataclass
class Best:
    """The best step so far; `value` is None before the first evaluation."""

    step: int = 0
    metric: str = ""
    value: float | None = None

    def consider(self, step: int, metric: str, value: float) -> bool:
        """Take note of an evaluation and tell whether it is the best so far: never NaN, and the first of equals."""
        if math.isnan(value) or (self.value is not None and value <= self.value):
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


class Periodic(Protocol):
    """Work that is done every so many epochs."""

    every_epochs: float


def every_steps(evaluation: Periodic, schedule: Schedule) -> int:
    """Compute the steps between two evaluations, or measures of health."""
    return schedule.steps_in(evaluation.every_epochs)
