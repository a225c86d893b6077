"""The optimiser and its parameter groups."""

import logging
from typing import Any

import torch
from torch import nn

from pretrain.objectives.base import ALL, Objective, plain_name
from pretrain.recipe.schema import Recipe

logger = logging.getLogger(__name__)


def parameter_groups(objective: Objective, weight_decay: float, turn: str = ALL) -> list[dict[str, object]]:
    """Group the trained parameters of a turn by weight decay and learning rate scale, those that decay first."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        # A parameter sharded by zero.Init has an empty shape of its own; ds_shape is the real one.
        rule = objective.rule(plain_name(name), getattr(parameter, "ds_shape", parameter.shape))
        if parameter.requires_grad and rule.turn == turn:
            groups.setdefault((rule.decays, rule.lr_scale), []).append(parameter)
    ordered = sorted(groups, key=lambda group: not group[0])
    for decay, scale in ordered:
        members = groups[decay, scale]
        count = sum(getattr(member, "ds_numel", member.numel()) for member in members)
        label = "with" if decay else "without"
        logger.info("%s weight decay, lr x %.4g: %d tensors, %d parameters", label, scale, len(members), count)
    return [
        {"params": groups[decay, scale], "weight_decay": weight_decay if decay else 0.0, "lr_scale": scale}
        for decay, scale in ordered
    ]


def build_optimizer(recipe: Recipe, objective: Objective, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimiser over `objective`: one fused kernel on an accelerator, torch's plain loop on the CPU.

    The learning rate is 0 until the first step sets it: DeepSpeed's 16-bit optimiser without ZeRO takes a step with
    zero gradients when it is built, which would otherwise decay the weights once.
    """
    optim, fused = recipe.optim, device.type != "cpu"
    groups: Any = parameter_groups(objective, optim.weight_decay)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=fused)
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=fused,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Undo the step named in `build_optimizer`, after DeepSpeed has built its wrapper, before a checkpoint is loaded.

    AdamW's step counter would make the bias correction of the first steps wrong (measured: a different loss after the
    first update). SGD's momentum would start with the weight decay of that step; from zero it takes up the first
    gradient whole, like one that has not been there before.
    """
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].zero_()
