"""Losses over the global batch and the cache that they are given: when it counts, and who can't have one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pretrain.data.samples import Batch
from pretrain.engine.build import open_cache
from pretrain.errors import RecipeError
from pretrain.objectives.base import Objective, WholeBatchObjective
from pretrain.recipe.load import load_recipe
from pretrain.runtime.gradient_cache import Embeddings
from pretrain.trained.replay_step import warn_of_losses


class Spread(WholeBatchObjective):
    """Mean distance of all rows from their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 2)

    def embed(self, batch: Batch) -> Embeddings:
        return {"row": self.model(batch["row"])}

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        return (embeddings["row"] - embeddings["row"].mean(0)).square().mean(), {}


class InTwoTurns(Spread):
    """The same by two updates."""

    turns = ("first", "second")


class Bare(Objective):
    """A loss over the global batch that embeds nothing apart."""

    whole_batch = True


def test_an_evaluation_between_two_steps_asks_no_cache() -> None:
    objective, rows = Spread(), torch.arange(12.0).view(4, 3)
    cache = open_cache(objective, 2)
    assert cache is not None and open_cache(Spread(), 1) is None
    objective.eval()
    expected = (objective.model(rows) - objective.model(rows).mean(0)).square().mean()
    assert torch.equal(objective({"row": rows}).loss, expected)
    objective.train()
    with cache.collecting(objective):
        for part in rows.split(2):
            objective({"row": part})
    assert float(objective({"row": rows[:2]}).loss) == pytest.approx(float(expected)), "of both micro-batches"


class Normalised(Objective):
    """Batch norms over all ranks."""

    cross_rank_batch_norm = True


@pytest.mark.parametrize(
    ("make", "micro", "ranks", "word"),
    [
        (Spread, 4, 1, "the whole batch"),
        (Spread, 8, 1, ""),
        (Normalised, 4, 2, "all ranks"),
        (Normalised, 4, 1, ""),
        (Objective, 2, 2, ""),
    ],
)
def test_a_replay_says_whose_losses_need_other_rows(
    make: Callable[[], Objective], micro: int, ranks: int, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_losses(make(), load_recipe("demo", ["batch.samples=8", f"batch.micro={micro}"]), ranks)
    assert (word in caplog.text) if word else not caplog.text


@pytest.mark.parametrize(
    ("make", "advice"),
    [(Bare, "or write the objective as a WholeBatchObjective$"), (InTwoTurns, "or make its updates one turn$")],
)
def test_advice_is_of_use_to_whom_it_is_given(make: Callable[[], Objective], advice: str) -> None:
    with pytest.raises(RecipeError, match=rf"loss of {make.__name__} looks across .* 2 micro-batches .* {advice}"):
        open_cache(make(), 2)
