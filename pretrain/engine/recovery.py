"""Acting on the guard's decisions: record the step, lower the rate, go back to a checkpoint, or end the run.

    RUN/incidents/step_00000123.json   what a bad step was made of
    RUN/guard.json                     rewinds so far, and the steps that they leave out

A rewind goes on in the same processes. The step that was bad is left out when the run comes there again: its samples
are fetched, so that the stream stays what the arithmetic says, and are not trained on. guard.json makes that survive a
kill before the next checkpoint; checkpoints from after the rewind hold it as well.
"""

import logging
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.resume import Resumable, find_checkpoint, load
from pretrain.engine.assemble import Run, check_continues, forget_after, layout, open_ledger, open_stream
from pretrain.engine.batches import MicroBatches
from pretrain.engine.evaluation import Best
from pretrain.errors import TrainingError
from pretrain.guards.results import Decision, StepResult
from pretrain.guards.skipped_steps import guard_state, remember

logger = logging.getLogger(__name__)


def recover(run: Run, steps_done: int, lr: float, result: StepResult) -> tuple[Run, int | None]:
    """Judge the step that was just made, and act; all ranks do the same.

    Returns:
        The run; and, where it went back to a checkpoint, its steps done now.

    Raises:
        TrainingError: the recipe says stop, or a budget is spent.
    """
    decision = run.guard.decide(steps_done, result)
    if decision is None:
        return run, None
    found = None
    if decision.action == "rewind":
        run.watchdog.expect_long("rewind")
        # What is being written may be the newest checkpoint to go back to.
        run.saver.wait()
        dist.barrier()  # rank 0 has published
        found = find_checkpoint(run.folder.checkpoints, run.ranks)
        decision = decision if found else _nothing_to_go_back_to(decision)
    # Before the weights are replaced: the record's norms are to be those of the bad step.
    _record(run, steps_done, decision, found, lr, result)
    if decision.action == "stop":
        raise TrainingError(decision.reason)
    logger.warning(decision.reason)
    if decision.action == "lower_lr":
        run.guard.lower()
    if found is not None:
        return rewind(run, steps_done, found), found.step
    return run, None


def _nothing_to_go_back_to(decision: Decision) -> Decision:
    reason = f"{decision.reason}, but there is none yet: only the update was left out, on all ranks"
    return replace(decision, action="skip", reason=reason)


def _record(
    run: Run, steps_done: int, decision: Decision, found: Resumable | None, lr: float, result: StepResult
) -> None:
    numbers: dict[str, Any] = {
        "loss": result.loss,
        "metrics": result.metrics,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "loss_scale": result.loss_scale,
        "update": "applied" if result.applied else "left out",
        "turns_updated": result.updated,
        "rewound_to": found.step if found else None,
        "guard": {name: value for name, value in run.guard.saved().items() if name != "windows"},
        "windows": {history: losses[-20:] for history, losses in run.guard.state.windows.items()},
    }
    path = run.inputs.incidents.write(decision, result.turn, numbers, run.built.engine.module)
    if path is not None:
        logger.warning("step %d: recorded in %s", steps_done, path)


def rewind(run: Run, step: int, found: Resumable) -> Run:
    """Go back to a checkpoint and leave out what led to `step` (counted from 1)."""
    check_continues(found, run.recipe, run.ranks, run.plan.sources)
    run.guard.rewound(guard_state(found.state), step, found.step)
    run.inputs.batches.close()
    # Before anything is loaded: a kill from here on must not lead into the same step with a fresh budget.
    if run.ranks.first:
        remember(run.folder.guard, run.guard.state)
    load(
        run.built.engine,
        found,
        layout(run.recipe, run.ranks),
        run.built.groups,
        run.built.engine.module.rank_state(),
    )
    dist.barrier()  # no rank writes to the lists while rank 0 shortens them
    if run.ranks.first:
        forget_after(run.folder, found.step, run.plan)
    run.reporter.rewound(found.step)
    dist.barrier()
    stream = open_stream(run.method, run.plan, run.ranks, found.step)
    ledger = open_ledger(run.recipe.data, run.folder, run.ranks, found)
    logger.warning("going on from step %d; skipped steps: %s", found.step, run.guard.state.skipped_steps)
    inputs = replace(run.inputs, batches=MicroBatches(stream, run.ranks.device), ledger=ledger)
    return replace(run, inputs=inputs, best=Best(**found.state["best"]))


def pass_over(run: Run, steps_done: int, lr: float) -> int:
    """Let the coming step pass without training on its samples, as a rewind decided; returns the steps done.

    The samples are fetched: what follows them in the stream, and the counts of bad ones, must stay what they are.
    """
    for _ in range(run.inputs.accumulation):
        run.inputs.ledger.record(next(run.inputs.batches))
    run.reporter.skipped_step(steps_done + 1, lr)
    logger.warning("step %d is left out, as decided when the run went back", steps_done + 1)
    return steps_done + 1
