"""Losses, gradients and means on one, two and four real gloo ranks; see tests/findings_program.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.data.compose import slots_of
from pretrain.errors import TrainingError
from pretrain.runtime import collectives
from pretrain.runtime.collectives import (
    gather,
    gather_with_gradient,
    mean,
    mean_with_gradient,
    own_rows,
    sum_with_gradient,
)
from pretrain.runtime.gradient_cache import GradientCache
from pretrain.runtime.process_group import Ranks

SAMPLES, VIEWS = 16, 2


class Encoder(nn.Module):
    """Two layers with biases, and a temperature that only the loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 5)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        with torch.no_grad():
            for value in self.parameters():
                value.add_(torch.linspace(-0.3, 0.4, value.numel()).view_as(value))

    def embed(self, rows: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.second(self.first(rows).tanh())}


def model() -> Encoder:
    torch.manual_seed(3)
    return Encoder()


def pixels() -> Tensor:
    """All rows of a step [SAMPLES * VIEWS, 6] in the order of positions, the views of a sample side by side."""
    return torch.randn(SAMPLES * VIEWS, 6, generator=torch.Generator().manual_seed(5))


def positions(ranks: Ranks, accumulation: int, part: int) -> list[int]:
    """The real plan's positions of this rank's micro-batch in step 0."""
    micro = SAMPLES // ranks.world_size // accumulation
    return [int(slot) for slot in slots_of(part, micro, ranks.rank, ranks.world_size)]


def rows_of(found: list[int]) -> Tensor:
    return torch.cat([pixels()[position * VIEWS : (position + 1) * VIEWS] for position in found])


def info_nce(rows: Tensor, temperature: Tensor) -> Tensor:
    """Both views against each other; later positions weigh more, so that the order counts."""
    first, second = nn.functional.normalize(rows, dim=1).unflatten(0, (-1, VIEWS)).unbind(1)
    logits, target = first @ second.T / temperature, torch.arange(len(first))
    cross_entropy = nn.functional.cross_entropy
    losses = cross_entropy(logits, target, reduction="none") + cross_entropy(logits.T, target, reduction="none")
    return (losses * torch.linspace(0.5, 1.5, len(losses))).mean()


def averaged(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Gradients as data parallelism averages them."""
    found = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    if ranks.world_size > 1:
        for value in found.values():
            dist.all_reduce(value)
            value /= ranks.world_size
    return found


def contrast(ranks: Ranks, accumulation: int, gradient: str = "sum") -> dict[str, Any]:
    """One step: with a gradient cache where there is more than one micro-batch."""
    module = model()

    def compare(embeddings: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = gather_with_gradient(embeddings["embedding"], ranks, VIEWS, gradient)  # type: ignore[arg-type]
        return info_nce(rows, module.temperature), {}

    batches = [rows_of(positions(ranks, accumulation, part)) for part in range(accumulation)]
    if accumulation == 1:
        losses = [compare(module.embed(batches[0]))[0]]
        losses[0].backward()
    else:
        cache, losses = GradientCache(accumulation), []
        with cache.collecting(module):
            for batch in batches:
                cache(module.embed(batch), compare)
        for batch in batches:
            losses.append(cache(module.embed(batch), compare)[0])
            (losses[-1] / accumulation).backward()
    return {"losses": [float(loss) for loss in losses], "gradients": averaged(module, ranks)}


def local_loss(ranks: Ranks) -> dict[str, Any]:
    """Own rows against all, each rank returning the mean over its own: open_clip's `local_loss`."""
    module = model()
    own = module.embed(rows_of(positions(ranks, 1, 0)))["embedding"]
    keys = gather_with_gradient(own, ranks, VIEWS)
    logits = own @ keys.T / module.temperature
    loss = nn.functional.cross_entropy(logits, own_rows(len(own), ranks, VIEWS))
    loss.backward()
    return {"losses": [float(mean(loss, ranks))], "gradients": averaged(module, ranks)}


def order(ranks: Ranks) -> dict[str, Any]:
    """Positions as gathered, by accumulation, by type, with views, and where a rank's own rows are."""
    found: dict[str, Any] = {}
    for accumulation in (1, 2, 4):
        parts = [torch.tensor(positions(ranks, accumulation, part)) for part in range(accumulation)]
        found[f"parts {accumulation}"] = torch.cat([gather(part, ranks) for part in parts])
        found[f"joined {accumulation}"] = gather(torch.cat(parts), ranks)
    own = torch.tensor(positions(ranks, 1, 0))
    views = torch.stack([own * 10, own * 10 + 1], 1).flatten()
    found["views"] = gather(views, ranks, VIEWS)
    found["own"] = bool(torch.equal(found["views"][own_rows(len(views), ranks, VIEWS)], views))
    for kind in (torch.bool, torch.uint8, torch.bfloat16, torch.float64):
        found[f"{kind}"] = gather((own % 3).to(kind)[:, None].expand(-1, 2), ranks)
    return found


def means(ranks: Ranks) -> dict[str, Any]:
    """Numbers over ranks whose parts differ: rank r has r + 1 things, the last one none where there are several."""
    things = torch.arange(1.0, 13.0)
    cuts = {1: [12], 2: [12, 0], 4: [5, 1, 6, 0]}[ranks.world_size]
    own = things.split(cuts)[ranks.rank].clone().requires_grad_()
    value = mean_with_gradient(own.square().mean(), ranks, count=len(own))
    (3 * value).backward()
    filled = torch.zeros(12)
    filled[sum(cuts[: ranks.rank]) :][: len(own)] = own.grad
    plain = torch.tensor(float(ranks.rank + 1), requires_grad=True)
    average = mean_with_gradient(plain, ranks)
    average.square().backward()
    nothing = torch.tensor(4.0, requires_grad=True)
    none = mean_with_gradient(nothing, ranks, count=0)
    none.backward()
    vector = torch.full((2,), float(ranks.rank), dtype=torch.bfloat16)
    return {
        "weighted": float(value),
        "weighted gradient": gather(filled[None], ranks).sum(0) / ranks.world_size,
        "plain": float(average),
        "plain gradient": float(plain.grad),
        "none": (float(none), float(nothing.grad)),
        "without gradient": mean(plain, ranks, torch.tensor(2.0)).requires_grad,
        "vector": sum_with_gradient(vector, ranks),
    }


def refusals(ranks: Ranks) -> list[str]:
    found = []
    for call in (
        lambda: gather(torch.zeros(3, 2), ranks, views=2),
        lambda: gather_with_gradient(torch.zeros(4, 2), ranks, gradient="mean"),  # type: ignore[arg-type]
    ):
        try:
            call()
        except TrainingError as error:
            found.append(str(error))
    return found


def wrong_order(ranks: Ranks) -> dict[str, Any]:
    """The same step with the rows of rank after rank, which must not pass for right."""
    right = collectives._all_rows
    collectives._all_rows = lambda tensor, ranks, views: right(tensor, ranks, len(tensor))
    try:
        return contrast(ranks, 1)
    finally:
        collectives._all_rows = right


def findings(ranks: Ranks) -> dict[str, Any]:
    """All of it, in one world."""
    found = {
        "order": order(ranks),
        "steps": {accumulation: contrast(ranks, accumulation) for accumulation in (1, 2, 4)},
        "official": {accumulation: contrast(ranks, accumulation, "official") for accumulation in (1, 2)},
        "local": local_loss(ranks),
        "means": means(ranks),
        "refusals": refusals(ranks),
    }
    return found | ({"wrong order": wrong_order(ranks)} if ranks.world_size > 1 else {})
