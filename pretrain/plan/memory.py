"""Memory of one rank at the moment when most is held, part by part.

Model states follow from the number of parameters, the number format and the ZeRO stage; activations are counted (see
trace.py). What DeepSpeed 0.19 holds beside them, and when, was measured: bench/memory.py compares.
"""

from dataclasses import dataclass

from pretrain.engine.ds_config import DTYPES, deepspeed_config, unwrapped
from pretrain.recipe.schema import Recipe

#: Context, libraries' workspaces and the allocator's unused pieces on an accelerator, bytes.
OVERHEAD = 2.5e9
#: What remains free: an allocator filled to the brim searches and fails.
USABLE = 0.94


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank when most is held: as the backward pass begins, or as gradients are reduced and applied.

    Attributes:
        weights: in the computing format; sharded at ZeRO 3.
        gradients: as far as they are kept at that moment.
        optimiser: float32 weights where they are not the weights themselves, and moments; sharded from ZeRO 1 on.
        buffers: communication buckets, gathered weights, float32 copies of gradients.
        activations: what the backward pass needs, and temporaries.
        host: optimiser states offloaded to host memory, not part of the sum.
    """

    weights: float
    gradients: float
    optimiser: float
    buffers: float
    activations: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the accelerator, without its own overhead."""
        return self.weights + self.gradients + self.optimiser + self.buffers + self.activations


def memory_of(recipe: Recipe, parameters: int, ranks: int, activations: float, on_cpu: bool = False) -> Memory:
    """Memory of one rank.

    Args:
        recipe: number format, ZeRO stage, offload, buckets.
        parameters: of the model, all trained.
        ranks: over which ZeRO shards.
        activations: peak bytes of a micro-batch.
        on_cpu: communication does not overlap there.
    """
    stage, width = recipe.zero.stage, DTYPES[recipe.compute.dtype].itemsize
    weights = parameters * width / (ranks if stage == 3 else 1)
    optimiser = parameters * (8 if unwrapped(recipe) else 12) / (ranks if stage > 0 else 1)
    offloaded = stage > 0 and recipe.zero.offload == "cpu"
    gradients, buffers, active = max(_moments(recipe, parameters, ranks, activations, on_cpu), key=sum)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimiser=0.0 if offloaded else optimiser,
        buffers=buffers,
        activations=active,
        host=optimiser if offloaded else 0.0,
    )


def _moments(
    recipe: Recipe, parameters: int, ranks: int, activations: float, on_cpu: bool
) -> list[tuple[float, float, float]]:
    """Gradients, buffers and activations at the two moments: backward pass begins; gradients reduced and applied."""
    stage, width = recipe.zero.stage, DTYPES[recipe.compute.dtype].itemsize
    whole = float(parameters)
    if stage == 0:
        # All gradients, then their flat copy for the all-reduce (float32), or float32 copies for the update.
        copies = width if recipe.compute.dtype == "fp32" else 4
        return [(0.0, 0.0, activations), (whole * width, whole * copies, 0.0)]
    if stage == 1 and recipe.compute.dtype == "bf16":
        # DeepSpeed's bf16 optimiser accumulates whole gradients in float32, and reduces flat copies of them.
        return [(whole * 4, whole * width, activations), (whole * 4, whole * 8, 0.0)]
    config = deepspeed_config(recipe, 1, parameters, on_cpu)["zero_optimization"]
    assert isinstance(config, dict)
    bucket = float(config["reduce_bucket_size"]) * width * (2 if config["overlap_comm"] else 1)
    shard = whole * 4 / ranks
    if stage == 3:
        gathered = min(whole, 2.0 * float(config["reduce_bucket_size"])) * width
        bucket += bucket / ranks  # what the reduce-scatter of a bucket puts out
        return [(shard, bucket + gathered, activations), (shard, bucket + gathered + shard, 0.0)]
    return [(0.0, bucket, activations), (shard, bucket + shard, 0.0)]
