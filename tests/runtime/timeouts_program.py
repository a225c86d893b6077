"""Timeouts of all process groups, DeepSpeed's among them; see tests/findings_program.py."""

import torch
import torch.distributed as dist
from torch import nn

from pretrain.runtime.process_group import Ranks, joined_groups, set_timeout

TIMEOUT_S = 77


def findings(ranks: Ranks) -> list[float]:
    """Build an engine, which makes groups of its own, and read every group's timeout in seconds."""
    import deepspeed
    from deepspeed.utils import groups

    set_timeout(10 * TIMEOUT_S)
    model = nn.Linear(3, 2)
    config = {"train_batch_size": ranks.world_size, "zero_optimization": {"stage": 2}}
    deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    own = dist.new_group(list(range(ranks.world_size)))
    dist.new_group([0])  # rank 1 is not in it
    set_timeout(TIMEOUT_S)
    found = joined_groups()
    assert own in found and groups._get_data_parallel_group() in found
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in found]
