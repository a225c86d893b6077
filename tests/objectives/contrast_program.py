"""Contrast of two sides with soft positives on one, two and four gloo ranks; see tests/findings_program.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.data.compose import slots_of
from pretrain.objectives.contrast import LogitScale, both_directions, file_numbers, normalized, same_group
from pretrain.runtime.collectives import gather_with_gradient, own_rows
from pretrain.runtime.gradient_cache import GradientCache
from pretrain.runtime.process_group import Ranks

SAMPLES, VIEWS = 16, 2
#: Files of a step's samples: some come twice.
FILES = [f"clip{position % 11}" for position in range(SAMPLES)]


class Sides(nn.Module):
    """An encoder for each side, a factor on the logits, and what weighs soft positives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second, self.scale = nn.Linear(6, 5), nn.Linear(6, 5), LogitScale(0.3)
        self.weight = nn.Parameter(torch.tensor(0.4))

    def embed(self, rows: Tensor, files: Tensor) -> dict[str, Tensor]:
        return {"first": self.first(rows).tanh(), "second": self.second(rows).tanh(), "file": files}

    def losses(self, embeddings: dict[str, Tensor], ranks: Ranks, **options: Any) -> Tensor:
        """Mean of both directions, over own rows; the other view of the own sample is a soft positive."""
        first, second = normalized(embeddings["first"]), normalized(embeddings["second"])
        own = own_rows(len(first), ranks, VIEWS)
        weights = (self.weight.expand(len(first), 1), (1 - self.weight).expand(len(first), 1))
        excluded = same_group(embeddings["file"], ranks, VIEWS)
        arguments: dict[str, Any] = {"excluded": excluded, "soft": own[:, None] ^ 1, "weights": weights}
        sides = both_directions(first, second, self.scale(), ranks, views=VIEWS, **arguments | options)
        # Later positions weigh more, so that the order counts.
        return (torch.stack(sides).mean(0) * torch.linspace(0.5, 1.5, SAMPLES * VIEWS)[own]).mean()


def rows_of(positions: list[int]) -> tuple[Tensor, Tensor]:
    """Rows and file numbers of some positions, the views of each side by side."""
    pixels = torch.randn(SAMPLES, VIEWS, 6, generator=torch.Generator().manual_seed(5))
    keys = [FILES[position] for position in positions for _ in range(VIEWS)]
    batch = {"source": torch.zeros(len(keys), dtype=torch.int64), "key": keys}
    return pixels[positions].flatten(0, 1), file_numbers(batch)


def positions(ranks: Ranks, accumulation: int = 1, part: int = 0) -> list[int]:
    """The real plan's positions of this rank's micro-batch."""
    micro = SAMPLES // ranks.world_size // accumulation
    return [int(slot) for slot in slots_of(part, micro, ranks.rank, ranks.world_size)]


def step(ranks: Ranks, accumulation: int, **options: Any) -> dict[str, Any]:
    """One step's loss and averaged gradients, with a gradient cache where there are several micro-batches."""
    sides, batches = Sides(), [rows_of(positions(ranks, accumulation, part)) for part in range(accumulation)]

    def compare(embeddings: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return sides.losses(embeddings, ranks, **options), {}

    if accumulation == 1:
        loss = compare(sides.embed(*batches[0]))[0]
        loss.backward()
    else:
        cache = GradientCache(accumulation)
        with cache.collecting(sides):
            for batch in batches:
                cache(sides.embed(*batch), compare)
        for batch in batches:
            loss = cache(sides.embed(*batch), compare)[0]
            (loss / accumulation).backward()
    return averaged(sides, loss, ranks)


def averaged(sides: Sides, loss: Tensor, ranks: Ranks) -> dict[str, Any]:
    found = {name: value.grad.clone() for name, value in sides.named_parameters() if value.grad is not None}
    found["loss"] = loss.detach().clone()
    if ranks.world_size > 1:
        for value in found.values():
            dist.all_reduce(value)
            value /= ranks.world_size
    return found


def whole_loss_of_an_official_gather(ranks: Ranks) -> dict[str, Any]:
    """As TVTSv2's code: every rank computes the loss of all rows, and the gather's backward keeps the own ones."""
    sides = Sides()
    embeddings = sides.embed(*rows_of(positions(ranks)))
    first, second = (
        gather_with_gradient(normalized(embeddings[name]), ranks, VIEWS, "official") for name in ("first", "second")
    )
    logits, own = first @ second.T * sides.scale(), torch.arange(SAMPLES * VIEWS)
    losses = [nn.functional.cross_entropy(one, own, reduction="none") for one in (logits, logits.T)]
    loss = (torch.stack(losses).mean(0) * torch.linspace(0.5, 1.5, len(own))).mean()
    loss.backward()
    return averaged(sides, loss, ranks)


def findings(ranks: Ranks) -> dict[str, Any]:
    plain = {"soft": None, "weights": None, "excluded": None}
    return {
        "steps": {accumulation: step(ranks, accumulation) for accumulation in (1, 2, 4)},
        "chunked": step(ranks, 2, chunk=3, form="log_of_sum"),
        "whole": step(ranks, 1, form="log_of_sum"),
        "official": step(ranks, 1, gradient="official", **plain),
        "their official": whole_loss_of_an_official_gather(ranks),
        "groups": same_group(rows_of([0, 11])[1], Ranks(0, 1, 0, torch.device("cpu"))),
    }
