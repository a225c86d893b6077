"""The optimiser and its parameter groups."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from pretrain.engine.lars import Lars
from pretrain.engine.turns import in_turns
from pretrain.objectives.base import ALL, Objective, plain_name
from pretrain.recipe.optimisers import OPTIMISERS
from pretrain.recipe.schema import Recipe

logger = logging.getLogger(__name__)

#: By `optim.name`, as in recipe/optimisers.py.
CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "lars": Lars,
}


def parameter_groups(objective: Objective, weight_decay: float) -> list[dict[str, object]]:
    """Group the trained parameters by turn, weight decay and learning rate scale, those that decay first."""
    groups: dict[tuple[bool, float, str], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            # A parameter sharded by zero.Init has an empty shape of its own; ds_shape is the real one.
            rule = objective.rule(plain_name(name), getattr(parameter, "ds_shape", parameter.shape))
            groups.setdefault((rule.decays, rule.lr_scale, rule.turn), []).append(parameter)
    # sorted is stable: checkpoints know groups by their number, so the order must follow from the recipe alone.
    ordered = sorted(groups, key=lambda group: not group[0])
    for decay, scale, turn in ordered:
        members = groups[decay, scale, turn]
        count = sum(getattr(member, "ds_numel", member.numel()) for member in members)
        label = f"{'with' if decay else 'without'} weight decay" + ("" if turn == ALL else f", turn {turn}")
        logger.info("%s, lr x %.4g: %d tensors, %d parameters", label, scale, len(members), count)
    return [
        {
            "params": groups[decay, scale, turn],
            "weight_decay": weight_decay if decay else 0.0,
            "decay_scale": float(decay),
            "lr_scale": scale,
            "turn": turn,
        }
        for decay, scale, turn in ordered
    ]


def build_optimizer(recipe: Recipe, objective: Objective, device: torch.device) -> torch.optim.Optimizer:
    """Build the recipe's optimiser over `objective`: one fused kernel on an accelerator, torch's plain loop on the CPU.

    The learning rate is 0 until the first step sets it: DeepSpeed's 16-bit optimiser without ZeRO takes a step with
    zero gradients when it is built, which would otherwise decay the weights once.
    """
    optim, kind = recipe.optim, OPTIMISERS[recipe.optim.name]
    options: dict[str, Any] = {key: value for key, value in asdict(optim).items() if key in kind.keys}
    if kind.fuses:
        options["fused"] = device.type != "cpu"
    groups = parameter_groups(objective, optim.weight_decay)
    optimizer = CLASSES[optim.name](groups, lr=0.0, weight_decay=optim.weight_decay, **options)
    return optimizer if objective.turns == (ALL,) else in_turns(optimizer)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Give every group that decays the weight decay `weight_decay` times its scale."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["decay_scale"]


def forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Undo the step named in `build_optimizer`, after DeepSpeed has built its wrapper, before a checkpoint is loaded.

    AdamW's step counter would make the bias correction of the first steps wrong (measured: a different loss after the
    first update). Where weight decay is added to the gradient (Adam, SGD, LARS), moments would start with the decay of
    that step; from zero they take up the first gradient whole, like ones that have not been there before.
    """
    for state in optimizer.state.values():
        if "step" in state:
            # Of the same kind and place: fused kernels take the counter as a tensor on the device.
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
        for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if state.get(moment) is not None:
                state[moment].zero_()
