"""A recipe on a number of accelerators: memory, time of a step, and of the whole run."""

import math
from dataclasses import dataclass

from pretrain.data.index import ShardIndex
from pretrain.engine.build import build_on_meta, open_cache
from pretrain.engine.model_states import checkpoint_bytes, size_of
from pretrain.engine.schedules import build_schedule
from pretrain.errors import RecipeError
from pretrain.objectives.base import Method
from pretrain.plan.feeding import Feeding, Resources, feeding_of, shortages
from pretrain.plan.hardware import Gpu
from pretrain.plan.peak_memory import OVERHEAD, USABLE, Memory, memory_of
from pretrain.plan.trace import BACKWARD, Trace, trace_step
from pretrain.plan.traffic import Traffic, seconds_of, traffic_of

#: Bytes that the optimiser reads and writes for each parameter it updates: gradient, weights, two moments.
UPDATE_BYTES = 32


@dataclass(frozen=True)
class Times:
    """Seconds of one optimiser step, by what takes them; communication only as far as nothing hides it."""

    forward: float
    backward: float
    optimiser: float
    communication: float

    @property
    def total(self) -> float:
        """The step."""
        return self.forward + self.backward + self.optimiser + self.communication


@dataclass(frozen=True)
class Estimate:
    """A recipe on `gpus` accelerators.

    Attributes:
        gpus: ranks.
        gpu: the accelerator.
        parameters: of the model.
        micro: videos of one forward pass of one rank; the recipe's where it divides and fits, else the largest.
        largest_micro: videos of the largest forward pass that fits, whether or not it divides.
        accumulation: micro-batches of a step.
        trace: work of one micro-batch.
        published_macs: multiply-accumulates of a clip's forward pass as publications count.
        memory: of one rank.
        traffic: what one rank sends in a step.
        communication_s: time of the traffic alone, hidden or not.
        times: of one step.
        clips_per_s: of the whole job.
        mfu: share of the accelerators' matmul rate that the model's own work is (recomputed work not counted).
        steps: of the whole recipe; None: the size of the data is not known.
        checkpoint_bytes: of one checkpoint.
        feeding: what data loading needs.
        problems: what does not fit or can't keep up, and what to change.
    """

    gpus: int
    gpu: Gpu
    parameters: int
    micro: int
    largest_micro: int
    accumulation: int
    trace: Trace
    published_macs: dict[str, float]
    memory: Memory
    traffic: Traffic
    communication_s: float
    times: Times
    clips_per_s: float
    mfu: float
    steps: int | None
    checkpoint_bytes: float
    feeding: Feeding
    problems: list[str]

    @property
    def hours(self) -> float | None:
        """Of the whole recipe."""
        return None if self.steps is None else self.steps * self.times.total / 3600


class Planner:
    """Planner of one recipe on any number of one kind of accelerator.

    Args:
        method: the run.
        gpu: the accelerator.
        resources: cores and storage that feed it.
        indices: of the sources whose shards are there.
        epoch_steps: optimiser steps of an epoch; None: not known.
    """

    def __init__(
        self, method: Method, gpu: Gpu, resources: Resources, indices: list[ShardIndex], epoch_steps: int | None
    ) -> None:
        self.method, self.recipe = method, method.recipe
        self.gpu, self.resources, self.indices = gpu, resources, indices
        self.epoch_steps = epoch_steps
        self.objective = build_on_meta(method)
        self.size = size_of(self.objective)
        self.parameters = self.size.parameters
        self._traces: dict[int, Trace] = {}

    def trace(self, micro: int) -> Trace:
        """Trace the work of a micro-batch once, since it does not depend on the number of accelerators."""
        if micro not in self._traces:
            self._traces[micro] = trace_step(self.method, micro)
        return self._traces[micro]

    def estimate(self, gpus: int) -> Estimate:
        """Plan the run on `gpus` accelerators.

        Raises:
            RecipeError: batch.samples can't be dealt to that many, or a loss over the global batch not to so many
                micro-batches.
        """
        recipe, gpu = self.recipe, self.gpu
        if gpus < 1 or recipe.batch.samples % gpus:
            raise RecipeError(f"--gpus {gpus}: must divide batch.samples={recipe.batch.samples}")
        states = self._memory(gpus)
        largest = self._largest_micro(gpus, states)
        micro, problems = self._choose_micro(gpus, largest, states)
        # Only where the ranks divide the lanes has each rank lanes of its own, which keeps its reads close together.
        if recipe.data.lanes % gpus:
            lanes = math.lcm(gpus, recipe.data.lanes)
            problems.append(
                f"data.lanes={recipe.data.lanes} can't be dealt to {gpus} ranks: a run on so many needs data.lanes="
                f"{lanes} from its first step on (the order of samples follows from it)"
            )
        accumulation = recipe.batch.samples // (micro * gpus)
        trace = self.trace(micro)
        # A loss over the global batch embeds every micro-batch before the first one is trained on.
        forwards = 1 if open_cache(self.objective, accumulation) is None else 2
        traffic = traffic_of(recipe, self.size, gpus, accumulation, forwards)
        times = self._times(trace, accumulation, forwards, gpus, traffic)
        videos_per_s = recipe.batch.samples / times.total
        clips_per_s = videos_per_s * recipe.input.views
        feeding = feeding_of(recipe, videos_per_s, gpus, self.resources, self.indices)
        return Estimate(
            gpus=gpus,
            gpu=gpu,
            parameters=self.parameters,
            micro=micro,
            largest_micro=largest,
            accumulation=accumulation,
            trace=trace,
            published_macs=self.method.cost().macs,
            memory=self._memory(gpus, trace.peak_bytes, trace.batch_bytes),
            traffic=traffic,
            communication_s=seconds_of(traffic.total, gpu, gpus),
            times=times,
            clips_per_s=clips_per_s,
            mfu=clips_per_s * trace.model_flops / trace.clips / (gpu.matmul_tflops * 1e12 * gpus),
            steps=self._steps(),
            checkpoint_bytes=checkpoint_bytes(recipe, self.size),
            feeding=feeding,
            problems=problems + shortages(recipe, feeding, self.resources),
        )

    def _memory(self, gpus: int, activations: float = 0.0, ahead: float = 0.0) -> Memory:
        return memory_of(self.recipe, self.size, gpus, activations, ahead)

    def _steps(self) -> int | None:
        if self.epoch_steps is None:
            return None
        return build_schedule(self.recipe, self.epoch_steps).total

    def _times(self, trace: Trace, accumulation: int, forwards: int, gpus: int, traffic: Traffic) -> Times:
        """Estimate by a roofline: each kernel takes the time of its arithmetic or memory traffic, the longer one."""
        gpu, zero = self.gpu, self.recipe.zero
        seconds = {BACKWARD: 0.0, "forward": 0.0}
        for kernel in trace.operations:
            arithmetic, moved = kernel.flops / (gpu.matmul_tflops * 1e12), kernel.bytes / (gpu.memory_gbs * 1e9)
            seconds[BACKWARD if kernel.part == BACKWARD else "forward"] += max(arithmetic, moved, gpu.launch_s)
        forward, backward = accumulation * forwards * seconds["forward"], accumulation * seconds[BACKWARD]
        gradients, weights = (seconds_of(sent, gpu, gpus) for sent in (traffic.gradients, traffic.weights))
        if zero.overlap and zero.stage == 3:  # weights travel while the passes go on, gradients in the backward pass
            exposed = max(0.0, gradients + weights - forward - backward)
        elif zero.overlap and not (zero.stage == 1 and self.recipe.compute.dtype == "bf16"):
            # Weights are gathered after the update. Stage 1 in bf16 is DeepSpeed's BF16_Optimizer, which sends nothing
            # before the backward pass is over.
            exposed = max(0.0, gradients - seconds[BACKWARD]) + weights
        else:
            exposed = gradients + weights
        updated = self.size.trained / (gpus if zero.stage > 0 else 1)
        update = updated * UPDATE_BYTES / (gpu.memory_gbs * 1e9)
        return Times(forward, backward, update, exposed)

    def _largest_micro(self, gpus: int, states: Memory) -> int:
        """Count the videos whose activations fit beside the states: they grow by the same amount with each one."""
        # Each video's own bytes twice: the next micro-batch is copied while this one is trained on.
        # A batch norm of vectors refuses a single row, which in training has all ranks' beside it.
        least = 2 if self.objective.cross_rank_batch_norm else 1
        first, next_ = (trace.peak_bytes + trace.batch_bytes for trace in map(self.trace, (least, least + 1)))
        room = self.gpu.memory * USABLE - OVERHEAD
        if states.total > room:
            return 0
        beside = self._memory(gpus, activations=1e15)  # so many that they decide which moment holds most
        # What a further video adds is the difference of two traces; what does not grow with them is in `first`.
        return max(0, int((room - (beside.total - 1e15) - first) // (next_ - first)) + least)

    def _choose_micro(self, gpus: int, largest: int, states: Memory) -> tuple[int, list[str]]:
        """Choose the recipe's micro-batch where it divides and fits, else the largest that does; and say why."""
        recipe, gpu = self.recipe, self.gpu
        share, wanted = recipe.batch.samples // gpus, recipe.batch.micro
        if wanted <= largest and share % wanted == 0:
            return wanted, []
        if largest == 0:
            return 1, [
                f"it does not fit: model states of {states.total / 1e9:.1f} GB and the activations of one video exceed "
                f"the {gpu.memory / 1e9:.0f} GB of {gpu.name}. Raise zero.stage (now {recipe.zero.stage}), set "
                "compute.activation_checkpointing=selective or true, or zero.offload=cpu, or take more or larger ones"
            ]
        fitting = max(micro for micro in range(1, min(largest, share) + 1) if share % micro == 0)
        reason = f"does not fit, at most {largest} do" if wanted > largest else f"does not divide {share} videos a rank"
        return fitting, [f"batch.micro={wanted} {reason}: planned with batch.micro={fitting}"]
