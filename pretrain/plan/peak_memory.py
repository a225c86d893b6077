"""Memory of one rank at the moment when most is held, part by part.

Weights, gradients and optimiser follow from the recipe (engine/model_states.py), activations are counted (trace.py).
What DeepSpeed 0.19 holds beside them, and when, was read in its code and measured: bench/memory.py compares.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.model_states import Kind, ModelSize, gradient_width, model_states, offloads
from pretrain.recipe.optimisers import OPTIMISERS, temporary_bytes
from pretrain.recipe.schema import Recipe
from pretrain.runtime.dtypes import DTYPES

#: Context, libraries' workspaces and the allocator's unused pieces on an accelerator, bytes.
OVERHEAD = 2.5e9
#: What remains free: an allocator filled to the brim searches and fails.
USABLE = 0.94
#: Values that DeepSpeed's engine copies into one tensor for an all-reduce (engine.py, MEMORY_OPT_ALLREDUCE_SIZE).
ALLREDUCE_VALUES = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank when most is held.

    Attributes:
        weights: in the computing format, sharded at ZeRO 3; and frozen towers, whole.
        gradients: as far as they are kept at that moment.
        optimiser: float32 weights where they are not the weights themselves, and moments; sharded from ZeRO 1 on.
        buffers: the model's own, communication buckets, gathered weights, copies of gradients, temporaries, and the
            micro-batch that is copied ahead.
        activations: what the backward pass needs, and temporaries.
        host: states offloaded to host memory, not part of the sum.
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


@dataclass(frozen=True)
class MemoryMoment:
    """Memory that comes and goes, at one time; bytes."""

    gradients: float
    buffers: float
    activations: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.buffers + self.activations


def memory_of(
    recipe: Recipe, size: ModelSize, ranks: int, activations: float, ahead: float = 0.0, on_cpu: bool = False
) -> Memory:
    """Compute the memory of one rank.

    Args:
        recipe: number format, ZeRO stage, offload, buckets, optimiser.
        size: of the model.
        ranks: over which ZeRO shards.
        activations: peak bytes of a micro-batch.
        ahead: bytes of the next one, which lies on the device while this one is trained on (engine/prefetch.py).
        on_cpu: communication does not overlap there, and the optimiser's update is no fused kernel.
    """
    states = model_states(recipe, size, ranks)

    def held(kind: Kind, host: bool = False) -> float:
        return sum(part.size for part in states if part.kind == kind and part.host == host)

    flow = _Flow(recipe, size, ranks, activations, held("gradients"), on_cpu)
    moment = max(flow.moments(), key=lambda moment: moment.total)
    return Memory(
        weights=held("weights"),
        gradients=moment.gradients,
        optimiser=held("optimiser"),
        buffers=held("buffers") + moment.buffers + ahead,
        activations=moment.activations,
        host=held("optimiser", host=True) + held("gradients", host=True),
    )


class _Flow:
    """The moments of a step that can be the fullest.

    Args:
        recipe: as memory_of.
        size: as memory_of.
        ranks: as memory_of.
        activations: as memory_of.
        gradients: bytes of a step's gradients on the accelerator, as they are accumulated.
        on_cpu: as memory_of.
    """

    def __init__(
        self, recipe: Recipe, size: ModelSize, ranks: int, activations: float, gradients: float, on_cpu: bool
    ) -> None:
        config = deepspeed_config(recipe, 1, size.parameters, on_cpu)["zero_optimization"]
        assert isinstance(config, dict)
        self.recipe, self.ranks, self.activations, self.gradients = recipe, ranks, activations, gradients
        self.parameters, self.trained = float(size.parameters), float(size.trained)
        self.width, self.summed = DTYPES[recipe.compute.dtype].itemsize, gradient_width(recipe)
        self.bucket = min(float(config["reduce_bucket_size"]), self.trained)
        self.config = config
        #: Gradients of earlier micro-batches are there while another one is computed.
        self.kept = gradients if recipe.batch.samples > recipe.batch.micro * ranks else 0.0
        shards = ranks if recipe.zero.stage > 0 else 1
        self.share = self.trained / shards
        fused = not on_cpu and OPTIMISERS[recipe.optim.name].fuses
        self.update = 0.0 if offloads(recipe) or fused else self.share * temporary_bytes(recipe.optim)

    def moments(self) -> Iterator[MemoryMoment]:
        """List those of the recipe's ZeRO stage."""
        stage = self.recipe.zero.stage
        if stage == 0:
            return self._unsharded()
        if stage == 1 and self.recipe.compute.dtype == "bf16" and not offloads(self.recipe):
            return self._bf16_optimizer()
        return self._gathering() if stage == 3 else self._bucketed()

    def _unsharded(self) -> Iterator[MemoryMoment]:
        """List those without ZeRO; updates go tensor by tensor, so their temporaries are small."""
        yield MemoryMoment(self.kept, 0.0, self.activations)
        # engine.allreduce_bucket flattens gradients into one tensor.
        yield MemoryMoment(self.gradients, min(self.trained, ALLREDUCE_VALUES) * self.width)
        if self.width < 4:
            # FP16_UnfusedOptimizer.step gives every parameter's float32 copy a gradient.
            yield MemoryMoment(self.gradients, self.trained * 4)

    def _bf16_optimizer(self) -> Iterator[MemoryMoment]:
        """List those of DeepSpeed's BF16_Optimizer, which stage 1 gets: gradients are kept whole, and never let go."""
        passing = self.trained * self.width  # parameters' own gradients: backward_prologue zeroes and keeps them
        yield MemoryMoment(self.gradients, passing, self.activations)
        # engine.allreduce_bucket flattens each group's gradients, and sends a copy in the computing format.
        yield MemoryMoment(self.gradients, passing + self.trained * (4 + self.width))
        yield MemoryMoment(self.gradients, passing + self.update)

    def _bucketed(self) -> Iterator[MemoryMoment]:
        """List those of DeepSpeedZeroOptimizer, stages 1 and 2: gradients go into a bucket, reduced when it is full."""
        copies = 2 if self.config["overlap_comm"] else 1
        # setup_buckets: the bucket has the format of what is accumulated at stage 1, of the weights at stage 2.
        value = self.summed if self.recipe.zero.stage == 1 else self.width
        bucket, in_float32 = self.bucket * value, self.width < self.summed
        part = self.share * self.summed if in_float32 or not offloads(self.recipe) else 0.0
        yield MemoryMoment(self.kept, bucket * copies, self.activations)
        if self.recipe.zero.stage == 1 and not self.config["overlap_comm"]:
            # reduce_gradients begins when the backward pass is over.
            yield MemoryMoment(self.gradients, bucket)
        else:
            # allreduce_bucket flattens the full bucket's gradients. The rank's own part of them is copied out after it,
            # but float32 sums of bf16 gradients are added up where they stay (_use_compact_grad_partition_buffer).
            yield MemoryMoment(max(self.kept, part * in_float32), bucket * (copies + 1), self._left(self.bucket))
            second = min(bucket, self.trained * value - bucket)
            yield MemoryMoment(max(self.kept, part), bucket * copies + second, self._left(2 * self.bucket))
        # step flattens the gradients of each group; float32 sums of bf16 gradients are flat already.
        yield MemoryMoment(part, (0.0 if in_float32 else self._flat_gradients()) + self.update)

    def _gathering(self) -> Iterator[MemoryMoment]:
        """List those of DeepSpeedZeroOptimizer_Stage3: one bucket that stays, and weights that come and go."""
        bucket = self.bucket * self.width
        yield MemoryMoment(self.gradients, bucket + self._gathered(self.parameters), self.activations)
        # reduce_scatter_coalesced copies the bucket; __avg_scatter_grads turns the rank's share of it into float32.
        copies = bucket + (self.bucket / self.ranks * 4 if self.width < self.summed else 0.0)
        coming = self._gathered(self.parameters - self.bucket)
        yield MemoryMoment(self.gradients, bucket + copies + coming, self._left(self.bucket))
        # _prepare_fp32_grad_for_sub_group flattens the gradients; no weights are gathered while the update goes on.
        yield MemoryMoment(self.gradients, bucket + self._flat_gradients() + self.update)

    def _gathered(self, parameters: float) -> float:
        """Count the bytes of whole weights, when `parameters` of them are still to be used.

        At most stage3_max_live_parameters are gathered. Those of a prefetch are there twice: AllGatherCoalescedHandle
        cuts each parameter out of the flat buffer of the all-gather, which lives until all parameters in it were used.
        """
        live = min(parameters, float(self.config["stage3_max_live_parameters"]))
        flat = min(parameters, float(self.config["stage3_prefetch_bucket_size"]))
        return (live + flat) * self.width

    def _left(self, passed: float) -> float:
        """Estimate the activations that are left when the backward pass has gone over `passed` parameters."""
        return self.activations * max(0.0, 1 - passed / self.trained)

    def _flat_gradients(self) -> float:
        """Count the bytes of the rank's gradients behind one another, and then in float32."""
        if offloads(self.recipe):
            return 0.0
        return self.share * (self.summed if self.summed == 4 else self.summed + 4)
