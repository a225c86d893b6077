"""Memory that one rank needs for a model, its gradients and its optimiser, by the ZeRO stage that shards it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pretrain.checkpoint.sharded_buffers import ShardedBuffers
from pretrain.engine.deepspeed_config import unwrapped
from pretrain.models.frozen import Footprint
from pretrain.objectives.base import Objective
from pretrain.recipe.optimisers import moments_of
from pretrain.recipe.schema import Recipe
from pretrain.runtime.dtypes import DTYPES

Kind = Literal["weights", "gradients", "optimiser", "buffers"]


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, all and trained ones, and bytes of buffers (averages, statistics, tables).

    `sharded_bytes` of the buffers are cut like the weights at stage 3. `towers` lie beside the model, frozen, by name.
    """

    parameters: int
    trained: int
    buffer_bytes: int = 0
    sharded_bytes: int = 0
    towers: Mapping[str, Footprint] = field(default_factory=dict)


@dataclass(frozen=True)
class Held:
    """One part of a rank's memory: bytes on this rank, and what they are; `host`: not on the accelerator."""

    name: str
    size: float
    remark: str
    host: bool = False
    kind: Kind = "weights"


def size_of(objective: Objective) -> ModelSize:
    """Count an objective, which may be on the meta device."""
    parameters = list(objective.parameters())
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        buffer_bytes=sum(buffer.nbytes for buffer in objective.buffers()),
        sharded_bytes=sum(part.get_buffer(name).nbytes for part in objective.modules()
                          if isinstance(part, ShardedBuffers) for name in part.shapes),
        towers={name: tower.footprint() for name, tower in objective.frozen_parts().items()},
    )  # fmt: skip


def model_states(recipe: Recipe, size: ModelSize, ranks: int) -> list[Held]:
    """List weights, gradients, optimiser states and buffers of one rank, when the gradients of a whole step are there.

    Frozen parameters are weights only: no gradient, and nothing in the optimiser, which is built of trained ones.
    Frozen towers are whole on each rank, whatever the stage: ZeRO does not know them.

    Args:
        recipe: the run.
        size: of its model.
        ranks: number of ranks.
    """
    dtype, trained = recipe.compute.dtype, size.trained
    width, summed = DTYPES[dtype].itemsize, gradient_width(recipe)
    moments, states = _optimiser_states(recipe)
    name = "weights" if trained == size.parameters else "trained weights"
    parts = [
        _sharded("weights", name, trained, width, recipe, 3, dtype, ranks),
        _sharded("weights", "frozen weights", size.parameters - trained, width, recipe, 3, dtype, ranks),
        _sharded("gradients", "gradients", trained, summed, recipe, 2, _summed_in(summed, dtype), ranks),
        _sharded("optimiser", "optimiser", trained, moments, recipe, 1, states, ranks),
        _sharded("buffers", "averaged weights", size.sharded_bytes // 4, 4, recipe, 3, "float32", ranks),
        Held(
            "buffers", size.buffer_bytes - size.sharded_bytes, "tables, statistics: whole on each rank", kind="buffers"
        ),
    ]
    if offloads(recipe):
        parts.append(_sharded("gradients", "gradients to update with", trained, 4, recipe, 1, "float32", ranks, True))
    parts += [Held(tower, footprint.bytes, footprint.remark) for tower, footprint in size.towers.items()]
    return [part for part in parts if part.size or part.name in ("gradients", "optimiser")]


def checkpoint_width(recipe: Recipe) -> int:
    """Count a checkpoint's bytes for a trained parameter: the optimiser's, and weights of their own but at stage 3."""
    # Measured on files of all stages: 16 for float32 with stages 1 and 2, 12 with stage 3 (the copy alone).
    weights = DTYPES[recipe.compute.dtype].itemsize if recipe.zero.stage < 3 else 0
    return weights + _optimiser_states(recipe)[0]


def checkpoint_bytes(recipe: Recipe, size: ModelSize) -> int:
    """Count the bytes of one checkpoint, all ranks' files together."""
    frozen = (size.parameters - size.trained) * DTYPES[recipe.compute.dtype].itemsize
    return size.trained * checkpoint_width(recipe) + frozen + size.buffer_bytes


def gradient_width(recipe: Recipe) -> int:
    """Return the bytes of an accumulated gradient's value; see `data_types` in deepspeed_config.py."""
    return 4 if recipe.compute.dtype == "bf16" and recipe.zero.stage > 0 else DTYPES[recipe.compute.dtype].itemsize


def offloads(recipe: Recipe) -> bool:
    """Tell whether optimiser, and the gradients that it reads, are in host memory; DeepSpeed offloads shards only."""
    return recipe.zero.stage > 0 and recipe.zero.offload == "cpu"


def _summed_in(width: int, dtype: str) -> str:
    return "summed in float32" if width == 4 else dtype


def _optimiser_states(recipe: Recipe) -> tuple[int, str]:
    """Return the bytes a parameter, and what they are."""
    moments = moments_of(recipe.optim)
    words = {0: "no moments", 1: "one moment", 2: "two moments"}[moments]
    # DeepSpeed's sharded and low-precision optimisers keep a float32 copy of the weights beside the moments, also where
    # the weights are float32 themselves (stage3.py means to do without and compares a device with its name).
    if unwrapped(recipe):
        return 4 * moments, words
    return 4 + 4 * moments, f"float32 weights, {words}"


def _on_host(kind: Kind, recipe: Recipe) -> bool:
    """Tell whether offload moves a part: gradients go with the optimiser, but not sums that ZeRO 1 and 2 reduce into.

    Stage 1 holds whole gradients until they are reduced; stage 2 adds bf16 gradients up on the accelerator.
    """
    if not offloads(recipe) or kind not in ("gradients", "optimiser"):
        return False
    reduced_into = recipe.zero.stage == 1 or (recipe.zero.stage == 2 and recipe.compute.dtype == "bf16")
    return kind == "optimiser" or not reduced_into


def _sharded(
    kind: Kind,
    name: str,
    count: int,
    width: int,
    recipe: Recipe,
    stage: int,
    content: str,
    ranks: int,
    host: bool = False,
) -> Held:
    """Make a part of `width` bytes a parameter that each rank holds a share of from ZeRO `stage` on."""
    shards = ranks if recipe.zero.stage >= stage else 1
    host = host or _on_host(kind, recipe)
    where = f"over {shards} ranks" if shards > 1 else "whole on each rank"
    remark = f"{content}: {width} bytes a parameter, {where}{', in host memory' if host else ''}"
    return Held(name, count * width / shards, remark, host, kind)
