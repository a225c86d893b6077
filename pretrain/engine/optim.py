"""AdamW and its two parameter groups."""

import logging
from collections.abc import Iterable

import torch
from torch import nn

from pretrain.recipe.schema import Recipe

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
    """Trainable parameters in two groups, with and without weight decay; empty groups are left out."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # A parameter sharded by zero.Init has an empty shape of its own; ds_shape is the real one.
            groups[decays(name, getattr(parameter, "ds_shape", parameter.shape))].append(parameter)
    for decay, members in groups.items():
        count = sum(getattr(member, "ds_numel", member.numel()) for member in members)
        logger.info("%s weight decay: %d tensors, %d parameters", "with" if decay else "without", len(members), count)
    decay_of = {True: weight_decay, False: 0.0}
    return [{"params": members, "weight_decay": decay_of[decay]} for decay, members in groups.items() if members]


def build_optimizer(recipe: Recipe, module: nn.Module, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `module`: one fused kernel on an accelerator, torch's plain loop on the CPU.

    The learning rate is 0 until the first step sets it: DeepSpeed's 16-bit optimiser without ZeRO takes a step with
    zero gradients when it is built, which would otherwise decay the weights once.
    """
    optim = recipe.optim
    return torch.optim.AdamW(
        parameter_groups(module, optim.weight_decay),  # type: ignore[arg-type]
        lr=0.0,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=device.type != "cpu",
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def forget_steps(optimizer: torch.optim.Optimizer) -> None:
    """Set AdamW's step counters back to 0, after DeepSpeed has built its wrapper and before a checkpoint is loaded.

    Undoes the step with zero gradients named in `build_optimizer`, which would make the bias correction of the first
    steps wrong (measured: a different loss after the first update).
    """
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
