"""One optimiser step, from top to bottom."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.data.bad_samples import BadSampleLedger
from pretrain.data.samples import Batch
from pretrain.engine.agreement import Agreed, Agreement, Flags
from pretrain.engine.batches import MicroBatches
from pretrain.engine.optimiser import set_lr
from pretrain.engine.prefetch import on_device
from pretrain.engine.transfers import Numbers
from pretrain.engine.turns import Turn
from pretrain.errors import TrainingError
from pretrain.guards.incidents import Incidents
from pretrain.guards.results import Spike, StepResult, history_of
from pretrain.guards.step_guard import StepGuard
from pretrain.models.dropout import ROW_KEYS, Rows, with_row_keys
from pretrain.models.gradient_limits import LossScale
from pretrain.objectives.base import Output
from pretrain.runtime.activity import note
from pretrain.runtime.gradient_cache import GradientCache
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.seeds import seed_forward


@dataclass(frozen=True)
class StepInputs:
    """Inputs that stay the same from step to step.

    Attributes:
        engine: DeepSpeed engine around the objective.
        turns: Updates of one batch, in their order.
        cache: Makes a loss over the global batch exact over several micro-batches; None where there is one.
        batches: Endless micro-batches of this rank.
        accumulation: Micro-batches in a step.
        own_clip: Where DeepSpeed has no optimiser of its own (`deepspeed_config.unwrapped`): the largest gradient
            norm, inf for no clipping; None where DeepSpeed checks and clips.
        ledger: Counts unusable samples.
        ranks: This process among all.
        seed: The run's seed.
        asked_to_stop: Whether this rank was asked to stop.
        guard: Tells spikes of the loss.
        incidents: Notes what each step is made of.
        rows: What the model's dropout is drawn by.
        scale: What its limits on gradients follow.
    """

    engine: Any
    turns: Sequence[Turn]
    cache: GradientCache | None
    batches: MicroBatches
    accumulation: int
    own_clip: float | None
    ledger: BadSampleLedger
    ranks: Ranks
    seed: int
    asked_to_stop: Callable[[], bool]
    guard: StepGuard
    incidents: Incidents
    rows: Rows = field(default_factory=Rows)
    scale: LossScale = field(default_factory=LossScale)


def train_step(inputs: StepInputs, step: int, lr: float) -> StepResult:
    """Take a step: one update for each of the objective's turns, all on the same batch.

    Args:
        inputs: The run.
        step: Steps done before, over all epochs.
        lr: Learning rate of this step.
    """
    engine, started = inputs.engine, time.perf_counter()
    counted, kept, updates = inputs.ledger.state(), list[Batch](), list[_Update]()
    inputs.incidents.begin(step)
    for turn in inputs.turns:
        with turn.taken(engine.module, engine.basic_optimizer):
            update = _update(inputs, turn.name if len(inputs.turns) > 1 else "", step, lr, kept)
        if update is None:
            inputs.ledger.reset(counted)  # the samples of this step are served again when the run goes on
            return StepResult(applied=False, out_of_data=True)
        updates.append(update)
        if not update.applied:
            break  # what follows would train on the result of an update that was left out
    return _result(inputs, updates, time.perf_counter() - started)


@dataclass(frozen=True)
class _Update:
    """An update as all ranks agree on it; attributes as in StepResult."""

    turn: str
    history: str
    agreed: Agreed
    spike: Spike | None
    norm: float
    applied: bool


def _update(inputs: StepInputs, turn: str, step: int, lr: float, kept: list[Batch]) -> _Update | None:
    """Fetch, forward, backward, check, clip, update; None where some rank has no data.

    The update is left out on all ranks where any rank's loss or the gradient is not finite. Two things make sure: a
    loss that is not finite poisons its own gradient, and the norm of the whole gradient, which all ranks have in
    common, is checked before the update, by DeepSpeed's optimisers, and here where there is none (float32 without
    ZeRO). A spike of the loss goes the same way: the guard knows its limit beforehand, so the device compares the loss
    that ranks agree on with it, and poisons the last backward pass; no ZeRO stage needs another way to drop gradients.

    The host waits for the device twice, and not while that has nothing to do: for what ranks agree on once the backward
    pass is queued behind it, and for the gradient's norm. tests/engine/test_waits.py names what DeepSpeed waits for.
    """
    engine, sums = inputs.engine, _Sums()
    inputs.incidents.begin_turn(turn)
    if inputs.cache is not None:
        _embed_all(inputs, inputs.cache, step, sums, kept)
    for micro in range(inputs.accumulation - 1):
        loss = _forward(inputs, step, micro, sums, kept)
        note("backward")
        engine.backward(poisoned(loss))
        engine.step()  # only counts the micro-batch; DeepSpeed updates at the last one
    loss = _forward(inputs, step, inputs.accumulation - 1, sums, kept)
    note("all-reduce")
    history = history_of(inputs.batches.source_of(step), turn)
    flags = Flags(inputs.asked_to_stop(), inputs.batches.error is not None, sums.waited, inputs.ledger.numbers())
    agreement = Agreement(sums.metrics, flags, inputs.ranks)
    limit = inputs.guard.limit(history)
    note("backward")
    engine.backward(poisoned(loss, agreement.loss > (limit.loss if inputs.guard.drops_spikes else math.inf)))
    # Only now: the device would stand still until the host has queued the backward pass.
    note("all-reduce")
    agreed = agreement.read()
    if agreed.out_of_data:
        return None
    spike = limit.spike(agreed.metrics["loss"])
    if spike is not None or agreed.nonfinite:
        # Before engine.step(), which clears them; on all ranks, since sharded gradients are put together by all.
        inputs.incidents.look_at_gradients(engine.module)
    own_norm = None if inputs.own_clip is None else clip_or_drop(engine.module, inputs.own_clip, inputs.incidents)
    note("optimiser")
    set_lr(engine.optimizer, lr)
    engine.step()  # DeepSpeed clips, checks the norm, updates, and clears the gradients
    norm = norm_of(engine) if own_norm is None else own_norm
    # Where clip_or_drop took the gradients away, was_step_applied is true of an update of nothing.
    return _Update(turn, history, agreed, spike, norm, engine.was_step_applied() and norm < float("inf"))


def _result(inputs: StepInputs, updates: list[_Update], step_s: float) -> StepResult:
    """Sum a step's updates up; the last one may have been left out."""
    last, metrics = updates[-1], dict[str, float]()
    for update in updates:
        metrics |= update.agreed.metrics
        metrics |= {f"loss_{update.turn}": update.agreed.metrics["loss"]} if update.turn else {}
    # An update that was left out ends the step; else the first spike is what there is to tell of.
    judged = last if not last.applied else next((update for update in updates if update.spike is not None), last)
    return StepResult(
        metrics=metrics,
        losses={update.history: update.agreed.metrics["loss"] for update in updates if update.applied},
        finite_loss=last.agreed.nonfinite == 0,
        applied=last.applied,
        turn=judged.turn,
        updated=() if last.applied else tuple(update.turn for update in updates[:-1]),
        # NaN compares as false, so that a norm of NaN is told as inf like the others.
        grad_norm=last.norm if last.norm < float("inf") else float("inf"),
        loss_scale=float(inputs.engine.optimizer.loss_scale) if inputs.engine.fp16_enabled() else None,
        spike=judged.spike,
        stop=last.agreed.stop > 0,
        bad_samples=round(sum(last.agreed.samples[1::3])),
        too_many_bad=inputs.ledger.judge(last.agreed.samples),
        data_s=sum(update.agreed.data_s for update in updates),
        step_s=step_s,
    )


@dataclass
class _Sums:
    """Sums over a step's micro-batches: means of metrics, seconds of waiting for data."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    waited: float = 0.0


def _fetch(inputs: StepInputs, sums: _Sums) -> Batch:
    note("data")
    asked = time.perf_counter()
    batch = next(inputs.batches)
    sums.waited += time.perf_counter() - asked
    inputs.ledger.record(batch)
    return with_row_keys(inputs.seed, batch)


def _embed_all(inputs: StepInputs, cache: GradientCache, step: int, sums: _Sums, kept: list[Batch]) -> None:
    """Embed a step's micro-batches without gradient, so that each can then be compared with all of them."""
    with cache.collecting(inputs.engine.module):
        for micro in range(inputs.accumulation):
            kept.append(on_device(_fetch(inputs, sums), inputs.ranks.device))
            note("forward")
            seed_forward(inputs.seed, step, micro, inputs.ranks.rank)
            inputs.rows.keys = kept[micro].get(ROW_KEYS)
            inputs.engine.module(kept[micro])


def _forward(inputs: StepInputs, step: int, micro: int, sums: _Sums, kept: list[Batch]) -> Tensor:
    """Compute the loss of a micro-batch; what is asked for again, by a later turn, is kept."""
    if micro == len(kept):
        batch = _fetch(inputs, sums)
        # One turn: nothing reads it again, and a whole step's clips would stay in memory.
        kept.append(batch if len(inputs.turns) > 1 else {})
    else:
        batch = kept[micro]
    note("forward")
    # The same seed in every turn: what is drawn for the first is drawn for the second.
    seed_forward(inputs.seed, step, micro, inputs.ranks.rank)
    rows = on_device(batch, inputs.ranks.device)
    inputs.rows.keys = rows.get(ROW_KEYS)
    tell_scale(inputs.scale, inputs.engine, inputs.rows, inputs.accumulation)
    output = inputs.engine(rows)
    check_output(output)
    inputs.incidents.note(batch, output.loss)
    for name, value in {**output.metrics, "loss": output.loss}.items():
        # In float64: a bfloat16 metric would lose its last digits in the sum over micro-batches.
        sums.metrics[name] = sums.metrics.get(name, 0.0) + value.detach().double() / inputs.accumulation
    loss: Tensor = output.loss
    return loss


def tell_scale(scale: LossScale, engine: Any, rows: Rows, accumulation: int) -> None:
    """Tell limits on gradients what the coming loss is multiplied by, and over how many rows of a step it is a mean."""
    scale.value = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    scale.rows = None if rows.keys is None else len(rows.keys) * accumulation


def check_output(output: Any) -> None:
    """Refuse what an objective must not return, before it fails somewhere behind.

    Raises:
        TrainingError: no `Output`, or a loss or metric that is not one number.
    """
    if not isinstance(output, Output):
        raise TrainingError(
            f"the objective's forward returned {type(output).__name__}, allowed: objectives.base.Output"
        )
    for name, value in {"loss": output.loss, **output.metrics}.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise TrainingError(f"the objective's {name} is {found}, allowed: a tensor of one number")


def poisoned(loss: Tensor, always: Tensor | None = None) -> Tensor:
    """Return the loss itself where it is finite, else NaN with a NaN gradient; so too where `always`, bool [], is true.

    An infinite loss can have a finite gradient (a sum that overflowed), which would go unnoticed into the update. Works
    on the device, without waiting for it.
    """
    # 0 of a finite loss, else NaN. Not torch.where, which copies its numbers to the device, and waits for that.
    wrong = loss.detach() * 0
    if always is not None:
        wrong = wrong.masked_fill(always, float("nan"))
    # A product: NaN then goes through the backward pass into every gradient, which a constant NaN would not.
    return loss * (1 + wrong.float())


def norm_of(engine: Any) -> float:
    """Read the norm of the whole gradient that DeepSpeed's optimiser has just clipped; 0 where it takes none."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return 0.0
    return Numbers(norm).read()[0] if isinstance(norm, Tensor) else float(norm)


def clip_or_drop(module: nn.Module, largest: float, incidents: Incidents) -> float:
    """Scale the gradients to a norm of at most `largest`, or drop them all where the norm is not finite.

    AdamW and SGD pass over parameters without gradient, so the weights and their states then stay as they are. Returns
    the norm before clipping; the gradients are all-reduced, so all ranks come to the same.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    found = Numbers(norm).read()[0]
    if math.isfinite(found):
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    else:
        incidents.look_at_gradients(module)
        for parameter in parameters:
            parameter.grad = None
    return found
