"""Reconstruction of clips that a trained model has not seen: its quality in numbers and as a picture."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from pretrain.data.samples import Batch
from pretrain.data.stream import TrainStream
from pretrain.data.stream_plan import open_plan
from pretrain.errors import WeightsError
from pretrain.objectives.base import method_of
from pretrain.objectives.videomae import VideoMAEObjective
from pretrain.recipe.schema import Batch as BatchSize
from pretrain.recipe.schema import Source
from pretrain.trained.load_run import Trained

#: Clips of one forward pass.
MICRO = 8


def held_out_batches(trained: Trained, shards: str, clips: int) -> Iterator[Batch]:
    """Open centre-cropped clips of other shards, always the same ones: `clips` of them, rounded up to a multiple of 8.

    Positions in the videos and masks come from the samples' generators, as in training. Where the shards hold fewer
    videos, each gives several clips.
    """
    if not isinstance(trained.objective, VideoMAEObjective):
        raise WeightsError(
            f"{trained.source}: objective {trained.recipe.objective.name} reconstructs no pixels; videomae does, and "
            "methods that inherit from it"
        )
    recipe, count = trained.recipe, -(-clips // MICRO)
    data = replace(
        recipe.data,
        sources={"held_out": Source(shards=shards, stride=_stride(trained))},
        epoch_samples=count * MICRO,
        # Lanes are part of the order: with the recipe's, two runs would be compared on different clips.
        lanes=1,
        workers=0,
    )
    clip = replace(recipe.input, crop="center", views=1)
    recipe = replace(recipe, data=data, input=clip, batch=BatchSize(samples=MICRO, micro=MICRO))
    plan = open_plan(recipe.data, recipe.batch, recipe.run.seed)
    return islice(TrainStream(plan, method_of(recipe).samples(), rank=0, world_size=1), count)


def _stride(trained: Trained) -> int | None:
    """Return the stride of the run's own sources, where they agree; else the recipe's default."""
    strides = {source.stride for source in trained.recipe.data.sources.values()}
    return strides.pop() if len(strides) == 1 else None


@torch.no_grad()
def reconstruction_errors(trained: Trained, batches: list[Batch]) -> dict[str, float]:
    """Compute root mean squared errors over hidden pixels by what fills them in (see the objective), 1 = full range."""
    found = [trained.objective.reconstruction_errors(batch) for batch in batches]  # type: ignore[operator]
    return {name: float(torch.stack([errors[name] for errors in found]).square().mean().sqrt()) for name in found[0]}


def reconstruction_pictures(trained: Trained, batches: list[Batch], clips: int) -> dict[str, Tensor]:
    """Collect original, masked and reconstructed videos, uint8 [clips, T, H, W, 3], one clip of each batch in turn."""
    rows = [trained.objective.pictures(batch) for batch in batches[:clips]]
    per_batch = -(-clips // len(rows))
    return {name: torch.cat([row[name][:per_batch] for row in rows])[:clips] for name in rows[0]}
