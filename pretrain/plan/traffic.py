"""Bytes that a rank sends in one optimiser step, and how long they take."""

from dataclasses import dataclass

from pretrain.engine.deepspeed_config import communication_dtype
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

    Gradients are all-reduced, which is both, at stages 0 to 2: DeepSpeed's buckets hold parts of several ranks
    (`use_multi_rank_bucket_allreduce`). Stages 0 and 1 do it once a step, stage 2 after each micro-batch; stages 1 and
    2 gather updated weights once. Stage 3 scatters gradients after each micro-batch, and gathers weights, frozen ones
    too, in each forward and again in each backward pass.

    Args:
        recipe: number formats and ZeRO stage.
        size: of the model.
        ranks: over which ZeRO shards.
        accumulation: micro-batches of a step.
        forwards: forward passes of each of them.
    """
    sent = (ranks - 1) / ranks
    gradients = sent * size.trained * DTYPES[communication_dtype(recipe, ranks)].itemsize
    trained, whole = (sent * count * DTYPES[recipe.compute.dtype].itemsize for count in (size.trained, size.parameters))
    return {
        0: Traffic(gradients=2 * gradients, weights=0.0),
        1: Traffic(gradients=2 * gradients, weights=trained),
        2: Traffic(gradients=2 * gradients * accumulation, weights=trained),
        3: Traffic(gradients=gradients * accumulation, weights=(forwards + 1) * whole * accumulation),
    }[recipe.zero.stage]


def seconds_of(sent: float, gpu: Gpu, ranks: int) -> float:
    """Compute the time to send so many bytes while nothing else goes on.

    Between nodes NCCL lays several rings, each through another of a node's network cards, so that a rank sends at the
    rate of all of them together, or of its link within the node where that is slower.
    """
    rate = gpu.link_gbs if ranks <= gpu.per_node else min(gpu.link_gbs, gpu.network_gbs * gpu.per_node)
    return sent / (rate * 1e9) if rate and ranks > 1 else 0.0
