"""Activation checkpointing: the backward pass computes again instead of keeping."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

#: What a recomputed block may keep: results that are dear to compute again, and small beside the others.
KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)

#: Activation checkpointing: none of a block's activations are recomputed, all are, or those that are cheap to.
Recompute = bool | Literal["selective"]


def run_blocks(blocks: Iterable[Callable[[Tensor], Tensor]], x: Tensor, recompute: Recompute) -> Tensor:
    """Apply blocks in order.

    Args:
        blocks: of a transformer, or what calls them.
        x: tokens [B, N, C].
        recompute: True: keep only each block's input for the backward pass; `selective`: keep the results of matrix
            products and attention as well, so that only norms and activation functions are computed again.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            context: dict[str, Any] = {"context_fn": _keep_products} if recompute == "selective" else {}
            # The reentrant kind gives no gradients behind a frozen embedding, whose output needs none.
            x = checkpoint(block, x, use_reentrant=False, **context)
        else:
            x = block(x)
    return x


def _keep_products() -> Any:
    # Right only where nothing is added into a kept product in place, as DeepSpeed's own linear does under ZeRO stage 3
    # (engine/deepspeed_config.py turns it off).
    return create_selective_checkpoint_contexts(list(KEPT))


def maybe_recompute(recompute: Recompute, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call, keeping only the inputs for the backward pass where asked."""
    if recompute and torch.is_grad_enabled():
        contexts = functools.partial(_without_statistics, function)
        return checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)
    return function(*arguments)


def _without_statistics(function: Any) -> tuple[Any, Any]:
    """Give the contexts of the first and the second computation: batch norms have seen their rows in the first."""
    return contextlib.nullcontext(), _statistics_kept(function)


@contextlib.contextmanager
def _statistics_kept(function: Any) -> Iterator[None]:
    modules = function.modules() if isinstance(function, nn.Module) else ()
    norms = [part for part in modules if isinstance(part, _BatchNorm) and part.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if count is None else count.clone() for *_, count in before]
    for norm in norms:
        # Not untracked: what is kept for the backward pass must be the same as in the first computation.
        norm.momentum = 0.0
    try:
        yield
    finally:
        for (norm, momentum, count), counted in zip(before, counts, strict=True):
            norm.momentum = momentum
            if count is not None and counted is not None:
                count.copy_(counted)
