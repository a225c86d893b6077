"""Weights after a step whose gradient only float32 can carry; see tests/findings_program.py."""

from typing import Any

import torch
from torch import nn

from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.recipe.load import load_recipe
from pretrain.runtime.process_group import Ranks

#: Gradients of the two ranks. Their mean, 128.5, needs nine bits, and bfloat16 has eight.
GRADIENTS = (256.0, 1.0)


def findings(ranks: Ranks) -> dict[tuple[int, str], float]:
    """Train one step in bfloat16 and give a weight that was 0, by ZeRO stage and format of communication."""
    return {(stage, dtype): step(stage, dtype, ranks) for stage in (1, 2, 3) for dtype in ("bf16", "fp32")}


def step(stage: int, dtype: str, ranks: Ranks) -> float:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    words = [f"zero.stage={stage}", "zero.init=never", f"zero.communication_dtype={dtype}", "compute.dtype=bf16"]
    recipe: Any = load_recipe("vit_b_dual", [*words, "batch.samples=2", "batch.micro=1"])
    config = deepspeed_config(recipe, 1, 4, on_cpu=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=dict(config)
    )
    engine.backward(engine(torch.full((1, 2), GRADIENTS[ranks.rank], dtype=torch.bfloat16)).sum())
    engine.step()
    return float(safe_get_full_fp32_param(model.weight)[0, 0])
