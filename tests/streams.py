"""The stream of training over a recipe's data, as the engine opens it."""

from pretrain.data.samples import Samples
from pretrain.data.stream import TrainStream
from pretrain.data.stream_plan import open_plan
from pretrain.objectives.base import method_of
from pretrain.recipe.schema import Recipe


def training_stream(
    recipe: Recipe, rank: int = 0, world: int = 1, start: int = 0, samples: Samples | None = None
) -> TrainStream:
    """One rank's micro-batches from step `start`; of the method's samples, unless others are given."""
    plan = open_plan(recipe.data, recipe.batch, recipe.run.seed)
    return TrainStream(plan, samples or method_of(recipe).samples(), rank, world, start)
