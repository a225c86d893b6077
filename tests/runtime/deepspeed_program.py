"""Three steps of a contrastive model in DeepSpeed engines of every ZeRO stage; see tests/findings_program.py.

Batch norm over ranks, dropout off, two micro-batches a step with a gradient cache, and one without.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.models.cross_rank_batch_norm import convert_batch_norm
from pretrain.runtime.collectives import gather_with_gradient, mean
from pretrain.runtime.gradient_cache import GradientCache
from pretrain.runtime.process_group import Ranks

SAMPLES, STEPS, LR = 16, 3, 0.1
STAGES = (0, 1, 2, 3)


class Output(NamedTuple):
    """A named tuple, in which DeepSpeed finds the loss."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """A contrastive objective as the gradient cache asks for."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.ranks = ranks
        self.model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 4))
        self.head = nn.Linear(4, 4)
        self.temperature = nn.Parameter(torch.full((1,), 0.5))  # DeepSpeed can not broadcast a scalar
        with torch.no_grad():
            for value in (*self.model.parameters(), *self.head.parameters()):
                value.add_(torch.linspace(-0.2, 0.3, value.numel()).view_as(value))
        convert_batch_norm(self, ranks)

    def embed(self, rows: Tensor) -> dict[str, Tensor]:
        first, second = self.model(rows).chunk(2)
        return {"first": first, "second": second}

    def compare(self, embeddings: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = (
            nn.functional.normalize(self.head(gather_with_gradient(embeddings[name], self.ranks)), dim=1)
            for name in ("first", "second")
        )
        losses = nn.functional.cross_entropy(
            first @ second.T / self.temperature, torch.arange(len(first)), reduction="none"
        )
        loss = (losses * torch.linspace(0.5, 1.5, len(losses))).mean()
        return loss, {"hardest": losses.max().detach()}

    def forward(self, rows: Tensor, cache: GradientCache | None = None) -> Output:
        embeddings = self.embed(rows)
        return Output(*(self.compare(embeddings) if cache is None else cache(embeddings, self.compare)))


def samples(step: int) -> tuple[Tensor, Tensor]:
    """Both views of all samples of a step, each [SAMPLES, 6], in the order of positions."""
    both = torch.randn(2, SAMPLES, 6, generator=torch.Generator().manual_seed(step))
    return both[0], both[1] * 0.3 + both[0]


def micro_batch(step: int, part: int, accumulation: int, ranks: Ranks) -> Tensor:
    """A rank's rows, all first views before all second ones."""
    size = SAMPLES // accumulation
    chosen = slice(part * size + ranks.rank, (part + 1) * size, ranks.world_size)
    return torch.cat([view[chosen] for view in samples(step)])


def train(stage: int, accumulation: int, dtype: str, ranks: Ranks) -> dict[str, Any]:
    import deepspeed

    objective = Objective(ranks)
    optimizer = torch.optim.SGD(objective.parameters(), lr=LR, momentum=0.9)
    config = {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 where nothing is said
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if dtype == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    cache, losses = GradientCache(accumulation), []
    for step in range(STEPS):
        batches = [micro_batch(step, part, accumulation, ranks) for part in range(accumulation)]
        if dtype == "bf16":
            batches = [rows.bfloat16() for rows in batches]
        extra = []
        if accumulation > 1:
            extra = [cache]
            with cache.collecting(engine.module):
                for rows in batches:
                    engine.module(rows, cache)
        for rows in batches:
            output = engine(rows, *extra)
            losses.append(float(mean(output.loss, ranks)))
            engine.backward(output.loss)
            engine.step()
    weights = {}
    for name, value in objective.named_parameters():
        with deepspeed.zero.GatheredParameters([value], enabled=stage == 3):
            weights[name] = value.detach().float()
    return {"losses": losses, "weights": weights, "buffers": dict(objective.named_buffers())}


def findings(ranks: Ranks) -> dict[tuple[int, int, str], Any]:
    """Losses, weights and buffers by ZeRO stage, number of micro-batches and type."""
    cases = [(stage, count, "fp32") for stage in STAGES for count in (1, 2)] + [(1, 2, "bf16"), (2, 2, "bf16")]
    return {case: train(*case, ranks) for case in cases}
