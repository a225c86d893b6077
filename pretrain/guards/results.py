"""Results and decisions of a step: plain data that the engine and the guards share."""

from dataclasses import dataclass, field
from typing import Literal

from pretrain.errors import DataError

Kind = Literal["loss", "gradient", "spike"]
Action = Literal["record", "skip", "lower_lr", "rewind", "stop"]


@dataclass(frozen=True)
class Spike:
    """A loss far above the recent ones: median and robust deviation of the window, and how many deviations above."""

    median: float
    deviation: float
    z: float


@dataclass(frozen=True)
class StepResult:
    """A step as all ranks agree on it.

    Attributes:
        metrics: `loss` and the objective's own, mean over micro-batches and ranks.
        losses: Loss of each update that was made, by the history that its spikes are told from (`history_of`).
        finite_loss: Whether every rank's loss was finite.
        applied: Whether the weights were updated; of several updates, by all of them.
        turn: Of several updates, the one that was left out, or whose loss is a spike.
        updated: Of several updates, those that were made before one was left out.
        grad_norm: Norm of the whole gradient before clipping; inf where it is not finite.
        loss_scale: fp16's, after the step; None in other formats.
        spike: Where the loss is a spike, how large.
        stop: Whether any rank was asked to stop.
        bad_samples: Unusable samples so far, all ranks.
        too_many_bad: Why the run must not go on after this step, where too many samples are unusable.
        out_of_data: Whether some rank got no data: the step does not count, and the weights are as before it.
        data_s: Seconds spent waiting for data, mean over ranks.
        step_s: Seconds of the whole step.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    finite_loss: bool = True
    applied: bool = True
    turn: str = ""
    updated: tuple[str, ...] = ()
    grad_norm: float = 0.0
    loss_scale: float | None = None
    spike: Spike | None = None
    stop: bool = False
    bad_samples: int = 0
    too_many_bad: DataError | None = None
    out_of_data: bool = False
    data_s: float = 0.0
    step_s: float = 0.0

    @property
    def loss(self) -> float:
        """The loss that is judged: of several updates, that of `turn`."""
        return self.metrics[f"loss_{self.turn}" if self.turn else "loss"]


def history_of(source: str, turn: str) -> str:
    """Name the losses that compare with one another: those of a source where each step has one, of a turn if several.

    Sources that take turns, and updates of one batch, have losses of their own: judged by a common history, every one
    of the larger ones would be a spike.
    """
    return " / ".join(name for name in (source, turn) if name)


@dataclass
class GuardState:
    """Memory of the guard from step to step.

    Attributes:
        windows: Losses of the latest updates, oldest first, by their history (`history_of`).
        in_a_row: Steps without an update up to now.
        skipped: Steps without an update in the whole run.
        lowered: How often the learning rate was lowered.
        lowered_left: Coming steps that still have the lowered rate.
        rewinds: How often the run went back to a checkpoint.
        skipped_steps: Steps, counted from 0, that pass without being trained on.
    """

    windows: dict[str, list[float]] = field(default_factory=dict)
    in_a_row: int = 0
    skipped: int = 0
    lowered: int = 0
    lowered_left: int = 0
    rewinds: int = 0
    skipped_steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Decision:
    """Reaction to a bad step.

    Attributes:
        kind: What was bad.
        what: The same in words.
        asked: The recipe's policy.
        action: What is done: the policy, or stop where its budget is spent.
        reason: What a person should know; of a stop, the error.
    """

    kind: Kind
    what: str
    asked: Action
    action: Action
    reason: str
    spike: Spike | None = None
