"""Continuing on another number of ranks, ZeRO stage or offload than a checkpoint was written with.

Each rank finds out which stretches of which parameters it holds now, and copies exactly those, weights and states of
the optimiser, out of the files of all former ranks. Nothing is merged in between and no converted checkpoint is
written; memory beyond the run's own is one parameter.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.deepspeed_files import Groups
from pretrain.checkpoint.partitions import OWN_KEYS, WEIGHT, Shards, open_shards
from pretrain.checkpoint.sharded_buffers import share_of, split_buffers, stored_buffers
from pretrain.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Spread of weights and optimiser: number of ranks, ZeRO stage, and where the optimiser is kept."""

    world_size: int
    stage: int
    offload: str = "none"

    @classmethod
    def of(cls, world_size: int, zero: Mapping[str, Any]) -> "Layout":
        """Return the layout of a recipe's section `zero`; without ZeRO nothing is offloaded."""
        return cls(world_size, zero["stage"], zero["offload"] if zero["stage"] else "none")

    def __str__(self) -> str:
        offloaded = "" if self.offload == "none" else f", optimiser offloaded to {self.offload}"
        return f"{self.world_size} ranks, ZeRO stage {self.stage}{offloaded}"

    def fits(self, other: "Layout") -> bool:
        """Tell whether shards of `other` can be loaded as they are. Without ZeRO every rank holds everything."""
        return self == other or self.stage == other.stage == 0


@dataclass(frozen=True)
class HeldSpan:
    """Values `begin` to `begin + count` of parameter `name`, updated by this rank.

    They are those of `line` from `offset` on; `line` is the key of their state in the optimiser.
    """

    name: str
    begin: int
    count: int
    line: Tensor
    offset: int


def load_reshaped(
    engine: Any, folder: Path, before: Layout, now: Layout, groups: Groups, weights_only: bool = False
) -> None:
    """Load a checkpoint into an engine of any layout. All ranks call it.

    Args:
        engine: DeepSpeed engine around the objective, trained or not.
        folder: DeepSpeed's folder inside the checkpoint.
        before: The layout that the checkpoint was written with.
        now: The engine's.
        groups: Names of the optimiser's parameters by group, in its order.
        weights_only: Fill what a forward pass uses, for an engine that is not going to train.

    Raises:
        CheckpointError: the checkpoint is of another optimiser or other parameters.
    """
    started = time.monotonic()
    module = engine.module
    shapes = {name: _shape(parameter) for name, parameter in module.named_parameters()}
    trained = {name: shapes[name] for group in groups for name in group}
    shards = open_shards(folder, before.world_size, before.stage, groups, trained)
    split_buffers(engine)
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):  # stage 3: give gathered weights back to their shards
        engine.optimizer.checkpoint_event_prologue()
    with torch.no_grad():
        if not weights_only:
            # Before anything is copied: a refusal must leave the engine as it was.
            check_optimizer(shards, engine.basic_optimizer)
            _fill_optimizer(shards, engine.basic_optimizer, list(_held(engine, now.stage, groups)))
        _fill_module(shards, module, now.stage)
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()
    carry_counters(shards, engine)
    logger.info("checkpoint converted: %s -> %s, %.1f s", before, now, time.monotonic() - started)


def _shape(parameter: nn.Parameter) -> torch.Size:
    # Stage 3 leaves an empty tensor in the parameter and keeps the whole shape beside it.
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def check_optimizer(shards: Shards, optimizer: torch.optim.Optimizer) -> None:
    """Refuse the states of another kind of optimiser, which the names of its options tell.

    Releases of torch add options, so a difference on one side only is none of kind.
    """
    ours, theirs = frozenset(optimizer.defaults) - OWN_KEYS, shards.options
    if ours - theirs and theirs - ours:
        raise CheckpointError(
            f"{shards.folder}: its optimiser has the options {', '.join(sorted(theirs))}, this run's "
            f"{type(optimizer).__name__} has {', '.join(sorted(ours))}. Continue with the optimiser that wrote it, or "
            "take over the weights alone with run.init_weights in a new run.dir"
        )


def _held(engine: Any, stage: int, groups: Groups) -> Iterator[HeldSpan]:
    """Yield what this rank's optimiser updates."""
    parameters = dict(engine.module.named_parameters())
    lines = [group["params"] for group in engine.basic_optimizer.param_groups]
    for number, group in enumerate(groups):
        for place, name in enumerate(group):
            parameter = parameters[name]
            if stage == 0:
                yield HeldSpan(name, 0, parameter.numel(), lines[number][place], 0)
            elif stage == 3:
                yield from _held_of_each(name, parameter)
            # None: no value of this parameter lies in this rank's piece of the line.
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                own, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield HeldSpan(name, own.start, own.numel, lines[number][0], flat.start)


def _held_of_each(name: str, parameter: Any) -> Iterator[HeldSpan]:
    """Yield this rank's pieces under stage 3: an equal one of every parameter; the last ranks' are shorter, or none."""
    optimizer = parameter._z3_optimizer
    number, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    begin = share * torch.distributed.get_rank()
    count = min(share, parameter.ds_numel - begin)
    if count > 0:
        yield HeldSpan(name, begin, count, optimizer.fp32_partitioned_groups_flat[number], offset)


def _fill_optimizer(shards: Shards, optimizer: torch.optim.Optimizer, held: list[HeldSpan]) -> None:
    """Copy float32 weights and states, stretch by stretch."""
    fused = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for part in held:
        state = optimizer.state[part.line]
        _copy(shards.read(WEIGHT, part.name, part.begin, part.count), part.line, part.offset)
        for kind, pieces in shards.pieces.items():
            if kind == WEIGHT or part.name not in pieces:  # without ZeRO a parameter that had no gradient has no state
                continue
            if state.get(kind) is None:  # some of DeepSpeed's optimisers make the states only at the first step
                state[kind] = torch.zeros_like(part.line, requires_grad=False)
            _copy(shards.read(kind, part.name, part.begin, part.count), state[kind], part.offset)
        for kind, values in shards.scalars.items():
            if part.name in values:
                # Where torch keeps a counter: beside the weights for fused kernels, else on the host.
                device = part.line.device if fused else torch.device("cpu")
                state[kind] = values[part.name].to(device, copy=True)


def _copy(values: Tensor, line: Tensor, offset: int) -> None:
    line.data.view(-1)[offset : offset + len(values)].copy_(values)


def _fill_module(shards: Shards, module: nn.Module, stage: int) -> None:
    """Copy what the forward pass uses: weights in its precision, frozen parameters, buffers."""
    for name, parameter in module.named_parameters():
        shape = _shape(parameter)
        if stage == 3:
            target = parameter.ds_tensor.data  # type: ignore[attr-defined]
            begin = target.numel() * torch.distributed.get_rank()
            # The last ranks' shares end in padding, which is in no file's pieces.
            count = max(0, min(target.numel(), shape.numel() - begin))
            target.view(-1)[:count].copy_(_forward_values(shards, name, begin, count))
        else:
            parameter.data.copy_(_forward_values(shards, name, 0, shape.numel()).view(shape))
    for name, buffer, shape in stored_buffers(module):
        if shards.untrained_shape(name) != shape:
            raise _absent(shards, f"{name} of shape {list(shape)}")
        begin, count = 0, shape.numel()
        if buffer.shape != shape:
            begin, count = share_of(count, torch.distributed.get_rank(), torch.distributed.get_world_size())
        buffer.copy_(_forward_values(shards, name, begin, count).view(buffer.shape))


def _forward_values(shards: Shards, name: str, begin: int, count: int) -> Tensor:
    """Read a stretch of a parameter or buffer: float32 where it is trained, else as the forward pass had it."""
    if name in shards.shapes:
        return shards.read(WEIGHT, name, begin, count)
    values = shards.read_untrained(name, begin, count)
    if values is None:
        raise _absent(shards, f"parameter {name}")
    return values


def _absent(shards: Shards, what: str) -> CheckpointError:
    return CheckpointError(
        f"{shards.folder}: no {what}. Continue with the recipe that wrote the checkpoint, or start a new run.dir with "
        "run.init_weights"
    )


def carry_counters(shards: Shards, engine: Any) -> None:
    """Take over DeepSpeed's counts of steps and fp16's loss scale, which its optimisers keep in two kinds of object."""
    for name, count in shards.counters.items():
        setattr(engine, name, count)
    if not engine.fp16_enabled():
        return
    scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
    for name, value in shards.loss_scale.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
