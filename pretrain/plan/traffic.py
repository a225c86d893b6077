"""Bytes that a rank sends in one optimiser step, and how long they take."""

from dataclasses import dataclass

from pretrain.engine.model_states import ModelSize
from pretrain.plan.hardware import Gpu
from pretrain.recipe.schema import Recipe
from pretrain.runtime.dtypes import DTYPES


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step (and receives as many), by purpose."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.weights


def traffic_of(recipe: Recipe, size: ModelSize, ranks: int, accumulation: int, forwards: int = 1) -> Traffic:
    """Compute the bytes of ring collectives: a reduce-scatter or an all-gather sends (n-1)/n of its whole.

    Stage 0 reduces whole gradients once a step (reduce-scatter and all-gather). Stage 1 scatters gradients and gathers
    updated weights once. Stages 2 and 3 scatter gradients after each micro-batch; stage 3 gathers weights, frozen ones
    too, in each forward and again in each backward pass.

    Args:
        recipe: number format and ZeRO stage.
        size: of the model.
        ranks: over which ZeRO shards.
        accumulation: micro-batches of a step.
        forwards: forward passes of each of them.
    """
    sent = (ranks - 1) / ranks * DTYPES[recipe.compute.dtype].itemsize
    trained, whole = sent * size.trained, sent * size.parameters
    return {
        0: Traffic(gradients=2 * trained, weights=0.0),
        1: Traffic(gradients=trained, weights=trained),
        2: Traffic(gradients=trained * accumulation, weights=trained),
        3: Traffic(gradients=trained * accumulation, weights=(forwards + 1) * whole * accumulation),
    }[recipe.zero.stage]


def seconds_of(sent: float, gpu: Gpu, ranks: int) -> float:
    """Compute the time to send so many bytes while nothing else goes on.

    A ring is as slow as its slowest link; between nodes each rank has its share of the network.
    """
    rate = gpu.link_gbs if ranks <= gpu.per_node else min(gpu.link_gbs, gpu.network_gbs)
    return sent / (rate * 1e9) if rate and ranks > 1 else 0.0
