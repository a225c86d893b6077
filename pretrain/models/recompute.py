"""Activation checkpointing: the backward pass computes again instead of keeping."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
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


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: Recompute) -> Tensor:
    """Apply blocks in order.

    Args:
        blocks: of a transformer.
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
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)
