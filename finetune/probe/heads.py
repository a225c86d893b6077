"""Linear and attentive probes: a grid of heads, each with its own rate and decay, trained in one pass over features."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.probe.features import Features
from pretrain.metrics.ranking import accuracies

#: Rates and decays of the grid.
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
DECAYS = (1e-4, 1e-2, 1e-1)
#: Heads of the attentive probe's attention: one for this many channels.
HEAD_CHANNELS = 64


class AttentiveHead(nn.Module):
    """Probe head: a learned query attends over the frozen tokens [B, N, C]; an MLP block and a linear layer follow."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm = nn.LayerNorm(dim)
        heads = max(n for n in range(1, max(1, dim // HEAD_CHANNELS) + 1) if dim % n == 0)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        pooled = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        return self.head((pooled + self.mlp(pooled))[:, 0])


@dataclass(frozen=True)
class GridPoint:
    """Head of the grid and how good it became, see `pretrain.metrics.ranking.accuracies`."""

    rate: float
    decay: float
    accuracies: dict[str, float]

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return self.accuracies["top1"]


def train_heads(
    train: Features, held_out: Features, kind: Literal["linear", "attentive"], epochs: int = 50, batch: int = 256,
    seed: int = 0, device: torch.device | None = None,
) -> list[GridPoint]:  # fmt: skip
    """Train all heads of the grid side by side; best first.

    Features are standardised by the training set's statistics. The grid's best is chosen on the held-out videos, as
    published probes do: with few videos it is a little optimistic.

    Args:
        train: features to learn from, pooled for linear heads, tokens for attentive ones.
        held_out: features to measure on.
        kind: of the heads.
        epochs: passes over the features.
        batch: videos in a step.
        seed: of the heads and the order.
        device: where to compute; None: the CPU.
    """
    device = device or torch.device("cpu")
    classes, dim = len(train.names), train.values.shape[-1]
    grid = list(itertools.product(RATES, DECAYS))
    torch.manual_seed(seed)
    heads = nn.ModuleList(nn.Linear(dim, classes) if kind == "linear" else AttentiveHead(dim, classes) for _ in grid)
    heads.to(device)
    groups = [{"params": list(head.parameters()), "lr": rate, "peak": rate, "weight_decay": decay}
              for head, (rate, decay) in zip(heads, grid, strict=True)]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    # Of the training videos alone: the held-out ones must not shape the features.
    mean, scale = statistics(train.values)
    steps_per_epoch = -(-len(train.values) // batch)
    order = torch.Generator().manual_seed(seed)
    for step in range(epochs * steps_per_epoch):
        if step % steps_per_epoch == 0:
            permutation = torch.randperm(len(train.values), generator=order)
        rows = permutation[step % steps_per_epoch * batch :][:batch]
        # Batch by batch: a float32 copy of all tokens would need twice the memory that was checked for.
        inputs = ((train.values[rows].float() - mean) / scale).to(device)
        factor = 0.5 * (1 + math.cos(math.pi * step / (epochs * steps_per_epoch)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        losses = [F.cross_entropy(head(inputs), train.targets[rows].to(device)) for head in heads]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()  # the heads share nothing: each gets its own gradient
        optimizer.step()
    scores = _score(heads, held_out, mean, scale, batch, device)
    points = [
        GridPoint(rate, decay, accuracies(score, held_out.targets))
        for (rate, decay), score in zip(grid, scores, strict=True)
    ]
    return sorted(points, key=lambda point: -point.top1)


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and deviation of each channel over all videos and tokens, float32 [C]."""
    total, square, count = torch.zeros(values.shape[-1]), torch.zeros(values.shape[-1]), 0
    for chunk in values.split(256):  # a float32 copy of all tokens at once would double the memory
        flat = chunk.float().flatten(0, -2)
        total, square, count = total + flat.sum(0), square + flat.square().sum(0), count + len(flat)
    mean = total / count
    # Rounding may leave less than 0 of a channel that hardly varies, whose root would be NaN.
    return mean, (square / count - mean.square()).clamp(min=0).sqrt() + 1e-6


@torch.no_grad()
def _score(heads: nn.ModuleList, features: Features, mean: Tensor, scale: Tensor, batch: int,
           device: torch.device) -> list[Tensor]:  # fmt: skip
    rows: list[list[Tensor]] = [[] for _ in heads]
    for chunk in features.values.split(batch):
        inputs = ((chunk.float() - mean) / scale).to(device)
        for kept, head in zip(rows, heads, strict=True):
            kept.append(head(inputs).cpu())
    return [torch.cat(kept) for kept in rows]
