"""What happens after a step whose update was left out."""

import logging

from pretrain.engine.step import StepResult
from pretrain.errors import TrainingError
from pretrain.recipe.schema import Guard

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Counts skipped steps in a row, which is saved in checkpoints, and ends the run by the recipe's rule.

    An fp16 step that only overflowed the loss scale, with a finite loss, is the loss scale's ordinary work: it does not
    count until the scale can't go lower.
    """

    def __init__(self, options: Guard, in_a_row: int = 0, total: int = 0) -> None:
        self._options = options
        self.in_a_row, self.total = in_a_row, total

    def check(self, step: int, result: StepResult) -> None:
        """Take note of step `step`; every rank has the same result and so ends, or goes on, alike.

        Raises:
            TrainingError: guard.nonfinite is stop, or guard.max_skips steps in a row were left out.
        """
        if result.applied:
            self.in_a_row = 0
            return
        if result.finite_loss and result.loss_scale is not None and result.loss_scale > 1:
            logger.info("step %d: fp16 overflow, loss scale now %g", step, result.loss_scale)
            return
        self.in_a_row += 1
        self.total += 1
        what = "the gradient" if result.finite_loss else "the loss"
        if self._options.nonfinite == "stop":
            raise TrainingError(
                f"step {step}: {what} is not finite, the update was left out and the run ends (guard.nonfinite=stop). "
                "The newest checkpoint is from before it; lower optim.base_lr, set optim.clip_grad, or "
                "guard.nonfinite=skip"
            )
        logger.warning("step %d: %s is not finite on some rank, update left out on all", step, what)
        if self.in_a_row > self._options.max_skips:
            raise TrainingError(
                f"step {step}: {self.in_a_row} steps in a row without a finite loss and gradient (guard.max_skips = "
                f"{self._options.max_skips}); the newest checkpoint is the place to go back to; lower optim.base_lr or "
                "set optim.clip_grad"
            )
