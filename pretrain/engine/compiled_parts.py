"""torch.compile of an objective, part by part.

A model that is compiled as one graph has one backward pass as well: every gradient appears when it is over, and no
bucket can be sent while it goes on. Each block of its own leaves gradients appearing one after another, and equal
blocks share what was compiled.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.objectives.base import Objective

logger = logging.getLogger(__name__)

#: Versions that a block may be compiled in: training, evaluation, and both with another number of rows.
VERSIONS = 4


def fetch_by_part(objective: Objective) -> None:
    """Let ZeRO stage 3 fetch the weights of each part that will be compiled at once, at its border.

    By default it hooks every module, also those inside of a block: each hook would cut the block's graph in two. Call
    it before the engine is built, which sets the hooks.
    """
    from deepspeed.utils import set_z3_leaf_module

    for part in _parts(objective).values():
        set_z3_leaf_module(part, True)


def compile_parts(objective: Objective, backend: str | Callable[..., Any] = "inductor") -> list[str]:
    """Compile blocks and the functions that `objective.COMPILED` names, in place; parameters keep their names.

    Args:
        objective: in its engine, so that DeepSpeed's hooks are there already.
        backend: of torch.compile; tests count with one of their own.

    Returns:
        The names of what was compiled: modules as in `named_modules`, functions of the objective.
    """
    parts = _parts(objective)
    # Parts whose numbers differ, as the rates of stochastic depth do from block to block, are graphs of their own: more
    # than torch's limit of 8, beyond which it would go on without compiling.
    limit = VERSIONS * len(parts)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    for part in parts.values():
        # The function inside, not the call: hooks, with which ZeRO stage 3 fetches weights, stay outside of the graph.
        part.forward = torch.compile(part.forward, backend=backend)
    for name in objective.COMPILED:
        setattr(objective, name, torch.compile(getattr(objective, name), backend=backend))
    names = [*parts, *objective.COMPILED]
    logger.info("compute.compile: %d parts, each with a graph of its own: %s", len(names), ", ".join(names))
    return names


def _parts(objective: Objective) -> dict[str, nn.Module]:
    """Find the outermost blocks, members of module lists that lie in no other, by name; else the whole model."""
    lists = [part for part in objective.modules() if isinstance(part, nn.ModuleList)]
    members = {member for one in lists for member in one}
    inner = {part for member in members for part in member.modules() if part is not member}
    blocks = {name: part for name, part in objective.named_modules() if part in members - inner}
    if blocks:
        return blocks
    logger.warning("compute.compile: the model has no blocks (members of an nn.ModuleList): one graph, one backward")
    return {"model": objective.model}
