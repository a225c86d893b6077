"""Judgement of steps that go wrong: loss or gradient are not finite, or the loss jumps far above recent ones.

Every number that is judged here has been agreed on by all ranks, and the guard's own state is the same on all, so all
come to the same decision without talking about it. The state is saved in checkpoints: a resumed run decides as the
uninterrupted one.
"""

import logging
import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.guards.results import Action, Decision, GuardState, Kind, Spike, StepResult
from pretrain.recipe.schema import Guard as Options

logger = logging.getLogger(__name__)

#: Standard deviation of a normal distribution, in median absolute deviations.
MAD_TO_DEVIATION = 1.4826
#: Least deviation that a spike is measured in, as a share of the median: a loss that hardly moves has none of its own.
LEAST_DEVIATION = 1e-3


@dataclass(frozen=True)
class SpikeLimit:
    """The loss above which a step is a spike, and the median and deviation that it follows from.

    Known before the step, so that the device can compare as well: a comparison comes out alike there and here, while
    CUDA divides by a number as it multiplies by its inverse.
    """

    median: float = 0.0
    deviation: float = 0.0
    loss: float = math.inf

    def spike(self, loss: float) -> Spike | None:
        """Tell how far a loss lies above the median, where it is a spike; one that is not finite is none."""
        if not self.loss < loss < math.inf:
            return None
        return Spike(self.median, self.deviation, (loss - self.median) / self.deviation)


class StepGuard:
    """Judge of each step by the recipe's rules.

    An fp16 step that only overflowed the loss scale, with a finite loss, is the loss scale's ordinary work: it does not
    count until the scale can't go lower.
    """

    def __init__(self, options: Options, state: GuardState | None = None) -> None:
        self._options, self.state = options, state or GuardState()

    def saved(self) -> dict[str, Any]:
        """Return the state, for a checkpoint."""
        return asdict(self.state)

    def lr(self, scheduled: float) -> float:
        """Return the learning rate of the coming step."""
        return scheduled * self._options.lower_lr_factor if self.state.lowered_left else scheduled

    def leaves_out(self, step: int) -> bool:
        """Tell whether step `step`, counted from 0, passes without being trained on."""
        return step in self.state.skipped_steps

    def limit(self, history: str = "") -> SpikeLimit:
        """Say from the recent losses of a history (`history_of`) which coming loss is a spike.

        Nothing is one before half of the window is filled, or below the window's median.
        """
        window, options = self.state.windows.get(history, []), self._options
        if options.spike == "ignore" or 2 * len(window) < options.window:
            return SpikeLimit()
        # Medians: a spike that is in the window already would lift a mean and its deviation, and hide the next one.
        median = statistics.median(window)
        spread = statistics.median(abs(value - median) for value in window) * MAD_TO_DEVIATION
        deviation = max(spread, LEAST_DEVIATION * abs(median))
        return SpikeLimit(median, deviation, median + options.z * deviation) if deviation else SpikeLimit()

    @property
    def drops_spikes(self) -> bool:
        """True where the update of a step whose loss is a spike is left out."""
        return self._options.spike not in ("ignore", "record")

    def decide(self, step: int, result: StepResult) -> Decision | None:
        """Take note of step `step` (counted from 1), and say what to do where it was bad."""
        state = self.state
        state.lowered_left = max(0, state.lowered_left - 1)
        # Only losses of updates enter the windows: one NaN would make a median worthless.
        for history, loss in result.losses.items():
            state.windows[history] = [*state.windows.get(history, []), loss][-self._options.window :]
        if result.applied:
            state.in_a_row = 0
        if result.applied and result.spike is None:
            return None
        if result.spike is None and result.finite_loss and result.loss_scale is not None and result.loss_scale > 1:
            logger.info("step %d: fp16 overflow, loss scale now %g", step, result.loss_scale)
            return None
        if not result.applied:
            state.in_a_row += 1
            state.skipped += 1
        return self._decision(step, result)

    def _decision(self, step: int, result: StepResult) -> Decision:
        kind, what = describe(result)
        key = "spike" if kind == "spike" else "nonfinite"
        asked: Action = getattr(self._options, key)
        spent = self._spent(asked)
        if not spent and asked != "stop":
            return Decision(kind, what, asked, asked, f"step {step}: {what}; {_WORDS[asked]}", result.spike)
        end = spent or "the update was left out and the run ends"
        advice = (
            f"(guard.{key}={asked}). The newest checkpoint is from before it; lower optim.base_lr, set optim.clip_grad "
            f"or another guard.{key}. launch/replay.py runs the step again and names the module that went wrong"
        )
        return Decision(kind, what, asked, "stop", f"step {step}: {what}, {end} {advice}", result.spike)

    def _spent(self, asked: Action) -> str:
        """Name the budget that leaves no way but to stop; empty where none is spent."""
        options, state = self._options, self.state
        if state.in_a_row > options.max_skips:
            return f"{state.in_a_row} steps in a row without an update (guard.max_skips = {options.max_skips})"
        if asked == "lower_lr" and state.lowered >= options.max_lowered:
            return f"the rate was lowered {state.lowered} times already (guard.max_lowered = {options.max_lowered})"
        if asked == "rewind" and state.rewinds >= options.max_rewinds:
            return f"the run went back {state.rewinds} times already (guard.max_rewinds = {options.max_rewinds})"
        return ""

    def lower(self) -> None:
        """Give the coming steps the lowered rate."""
        self.state.lowered += 1
        self.state.lowered_left = self._options.lower_lr_steps

    def rewound(self, before: GuardState, step: int, target: int) -> None:
        """Go on as after `target` steps, with the steps up to `step` (counted from 1) left out.

        Args:
            before: The state that was saved after `target` steps.
            step: The bad step.
            target: Steps done in the checkpoint.
        """
        first = max(target, step - self._options.leave_out)
        now = self.state
        # Those of rewinds since then too: going further back must not train on steps that were left out before.
        skipped_steps = sorted({*before.skipped_steps, *now.skipped_steps, *range(first, step)})
        # Rewinds are counted on: with the count of the checkpoint the budget would never be spent.
        self.state = GuardState(**asdict(before) | {"rewinds": now.rewinds + 1, "skipped_steps": skipped_steps})


_WORDS = {
    "record": "the update was applied",
    "skip": "update left out on all ranks",
    "lower_lr": "update left out on all ranks, and the learning rate is lowered",
    "rewind": "the run goes back to its newest checkpoint",
}


def describe(result: StepResult) -> tuple[Kind, str]:
    """Describe what is bad about a step."""
    after = f" (after the update of {' and '.join(result.updated)})" if result.updated else ""
    turn = f" of turn {result.turn}{after}" if result.turn else ""
    if not result.finite_loss:
        return "loss", f"the loss{turn} is not finite"
    if result.spike is None:
        return "gradient", f"the gradient{turn} is not finite"
    spike = result.spike
    return "spike", (
        f"the loss{turn}, {result.loss:.6g}, is a spike: {spike.z:.1f} deviations of {spike.deviation:.3g} above "
        f"the median {spike.median:.6g} of recent steps"
    )
