"""Attachment of a method's trainable parts to a model; the rest is frozen, and merged what can be merged."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from finetune.adapters import config
from finetune.adapters.config import Tune
from finetune.adapters.modules import AdaptMLP, LowRankUpdate
from pretrain.errors import RecipeError
from pretrain.models.backbone import Backbone, Prompts
from pretrain.models.linear import Linear
from pretrain.models.vit import Block

logger = logging.getLogger(__name__)

#: Trained with every method: the head, the norm between pooling and head, and a class token that is new.
TASK = ("head.", "fc_norm.", "added_class.")
#: Methods that attach parts to blocks.
ATTACHING = ("adaptformer", "vpt", "lora")
#: Row blocks of the linear layers that take a low-rank update.
ROW_BLOCKS = {"qkv": ("query", "key", "value"), "proj": ("proj",), "fc1": ("fc1",), "fc2": ("fc2",)}


def apply_tuning(model: Any, tune: Tune) -> list[str]:
    """Attach a method's parts to a model that has its weights, and freeze everything that it doesn't train.

    Load the backbone's weights before: the parts are no part of its files. Frozen parameters have `requires_grad`
    false; an optimiser must be built from the trainable ones only.

    Returns:
        Names of the trainable parameters.

    Raises:
        RecipeError: options that can't be built, a model that they don't fit, or one that has parts attached already.
    """
    problems = config.check(tune) + tuning_problems(model, tune)
    if any(True for _ in attached(model)):
        problems.append("the model has an adapter already; detach it, or switch with AdapterBank")
    if problems:
        raise RecipeError(problems)
    if tune.method == "adaptformer":
        attach_adaptformer(model, tune.adaptformer)
    elif tune.method == "vpt":
        attach_prompts(model, tune.vpt)
    elif tune.method == "lora":
        attach_lora(model, tune.lora)
    names = freeze(model, tune.method)
    parameters = dict(model.named_parameters())
    count = sum(_numel(parameters[name]) for name in names)
    logger.info("tune.method=%s trains %d of %d parameters", tune.method, count, sum(map(_numel, parameters.values())))
    return names


def tuning_problems(model: nn.Module, tune: Tune) -> list[str]:
    """List what keeps a method from working on a model: parts without a place, or nothing left to train."""
    method = tune.method
    if method in ATTACHING and not (isinstance(model, Backbone) and _blocks(model)):
        return [
            f"tune.method={method}: needs the blocks of a ViT (a model that inherits from pretrain.models.backbone."
            f"Backbone), found {type(model).__name__}; allowed here: full, linear, bitfit"
        ]
    if not any(is_trained(name, method) for name, _ in model.named_parameters()) and method not in ATTACHING:
        return [
            f"tune.method={method}: {type(model).__name__} has no parameter that it trains (names that begin with "
            f"{', '.join(TASK)}{' or end with bias' if method == 'bitfit' else ''}); allowed here: full"
        ]
    return []


def attach_adaptformer(model: Backbone, options: config.AdaptFormer) -> None:
    """Attach a bottleneck to each block."""
    for block in _blocks(model):
        # In the backbone's format and place: the model may have been moved before its parts come.
        block.adaptmlp = AdaptMLP(model.dim, options).to(block.norm1.weight)


def attach_prompts(model: Backbone, options: config.Prompts) -> None:
    """Attach prompts for each block, or for the first."""
    count = len(model.blocks) if options.form == "deep" else 1
    model.embeddings = Prompts(count, options.tokens, model.dim).to(_blocks(model)[0].norm1.weight)


def attach_lora(model: Backbone, options: config.LowRank) -> None:
    """Attach low-rank updates to the chosen layers of each block."""
    for block in _blocks(model):
        layers = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        for name, layer in layers.items():
            if set(ROW_BLOCKS[name]) & set(options.targets):
                update = LowRankUpdate(
                    layer.in_features, layer.out_features, ROW_BLOCKS[name], options.targets, options
                )
                layer.update = update.to(block.norm1.weight)


def attached(model: Backbone) -> Iterator[tuple[nn.Module, str]]:
    """Yield owner and attribute of every slot that holds something."""
    for module in model.modules():
        slots = {Linear: "update", Block: "adaptmlp", Backbone: "embeddings"}
        for kind, name in slots.items():
            if isinstance(module, kind) and getattr(module, name) is not None:
                yield module, name


def detach(model: Backbone) -> None:
    """Take every attached part away; the head stays."""
    # A list first: emptying a slot changes the modules that are walked over.
    for owner, name in list(attached(model)):
        setattr(owner, name, None)


def freeze(model: nn.Module, method: str) -> list[str]:
    """Set `requires_grad` by the method, and return the names of what is trained."""
    names = [name for name, _ in model.named_parameters() if is_trained(name, method)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(names))
    return names


def is_trained(name: str, method: str) -> bool:
    """Tell whether a method trains the parameter of this name.

    Decided by the method, not by what a checkpoint happened to lack as in the official AdaptFormer code.
    """
    if method == "full" or name.startswith(TASK):
        return True
    if method == "bitfit":
        return name.endswith("bias")
    return name.startswith("embeddings.") or ".adaptmlp." in name or ".update." in name


@torch.no_grad()
def merge(model: Backbone) -> None:
    """Add low-rank updates to their weights and remove them: the same function without extra cost.

    Raises:
        RecipeError: parts that no weight can take up: bottlenecks have a ReLU inside, prompts are tokens.
    """
    slots = list(attached(model))
    others = sorted({name for _, name in slots if name != "update"})
    if others or not slots:
        found = ", ".join(others) or "nothing attached"
        raise RecipeError(f"merging is exact for low-rank updates only; this model has {found}")
    for layer, _ in slots:
        assert isinstance(layer, Linear) and isinstance(layer.update, LowRankUpdate)
        # Summed in float32, and so rounded once.
        layer.weight.copy_(layer.weight.float() + layer.update.weight())
        layer.update = None


def _blocks(model: Backbone) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _numel(parameter: nn.Parameter) -> int:
    """Count elements, of a parameter that ZeRO stage 3 has partitioned too."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
