"""The optimiser and its parameter groups."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pretrain.engine.lars import Lars
from pretrain.recipe.schema import Optim, Recipe

logger = logging.getLogger(__name__)

#: Tensors that never decay although they have two or more dimensions (VideoMAEv2, optim_factory.get_parameter_groups).
NO_DECAY_NAMES = frozenset({"pos_embed", "cls_token", "mask_token"})


def plain_name(name: str) -> str:
    """A parameter's name without the pieces that torch.compile puts into it.

    The official code compares compiled names, so its mask_token silently decays
    (VideoMAEv2, optim_factory.get_parameter_groups).
    """
    return name.replace("_orig_mod.", "")


def decays(name: str, shape: Iterable[int]) -> bool:
    """Whether weight decay applies: tensors of two or more dimensions, but not biases, scales and tokens."""
    plain = plain_name(name)
    if plain.rpartition(".")[2] in NO_DECAY_NAMES or plain.endswith((".bias", ".scale")):
        return False
    return len(tuple(shape)) > 1


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in groups of equal weight decay and learning rate scale, those that decay first.

    The scale is `module.lr_scale(name)` where the module has such a method (`Objective`), else 1.
    """
    scale_of: Callable[[str], float] = getattr(module, "lr_scale", lambda name: 1.0)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # A parameter sharded by zero.Init has an empty shape of its own; ds_shape is the real one.
            decay = decays(name, getattr(parameter, "ds_shape", parameter.shape))
            groups.setdefault((decay, scale_of(plain_name(name))), []).append(parameter)
    ordered = sorted(groups, key=lambda group: not group[0])
    for decay, scale in ordered:
        members = groups[decay, scale]
        count = sum(getattr(member, "ds_numel", member.numel()) for member in members)
        label = "with" if decay else "without"
        logger.info("%s weight decay, lr x %.4g: %d tensors, %d parameters", label, scale, len(members), count)
    return [
        {
            "params": groups[decay, scale],
            "weight_decay": weight_decay if decay else 0.0,
            "decay_scale": float(decay),
            "lr_scale": scale,
        }
        for decay, scale in ordered
    ]


def build_optimizer(recipe: Recipe, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimiser over `module`: one fused kernel on an accelerator, torch's plain loop on the CPU.

    The learning rate is 0 until the first step sets it: DeepSpeed's 16-bit optimiser without ZeRO takes a step with
    zero gradients when it is built, which would otherwise decay the weights once.
    """
    groups: Any = parameter_groups(module, recipe.optim.weight_decay)
    return OPTIMISERS[recipe.optim.name](groups, recipe.optim, device.type != "cpu")


def _adamw(groups: Any, optim: Optim, fused: bool) -> torch.optim.Optimizer:
    betas = (optim.betas[0], optim.betas[1])
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=fused)


def _adam(groups: Any, optim: Optim, fused: bool) -> torch.optim.Optimizer:
    betas = (optim.betas[0], optim.betas[1])
    return torch.optim.Adam(groups, lr=0.0, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=fused)


def _sgd(groups: Any, optim: Optim, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=fused,
    )


def _lars(groups: Any, optim: Optim, fused: bool) -> torch.optim.Optimizer:
    return Lars(groups, lr=0.0, momentum=optim.momentum, weight_decay=optim.weight_decay, trust=optim.trust)


#: `optim.name`: from groups of parameters, the recipe's section, and whether to fuse, to the optimiser.
OPTIMISERS: dict[str, Callable[[Any, Optim, bool], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "lars": _lars,
}


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
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
        for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if state.get(moment) is not None:
                state[moment].zero_()
