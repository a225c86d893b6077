"""What one rank holds of a model, its gradients and its optimiser, and which ZeRO stage shards it."""

from dataclasses import dataclass

from pretrain.engine.ds_config import DTYPES
from pretrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Held:
    """One part of a rank's memory: bytes on this rank, and what they are; `host`: not on the accelerator."""

    name: str
    size: float
    remark: str
    host: bool = False


def model_states(recipe: Recipe, parameters: int, trained: int, buffer_bytes: int, ranks: int) -> list[Held]:
    """Weights, gradients, optimiser states and buffers of one rank.

    Frozen parameters are weights only: no gradient, and nothing in the optimiser, which is built of trained ones.

    Args:
        recipe: the run.
        parameters: of the model.
        trained: of them, those that are trained.
        buffer_bytes: averages, statistics and tables; ZeRO never shards them.
        ranks: number of ranks.
    """
    zero, dtype = recipe.zero, recipe.compute.dtype
    width = DTYPES[dtype].itemsize
    summed = 4 if dtype == "bf16" and zero.stage > 0 else width
    moments, states = _optimiser_states(recipe)
    parts = [
        _sharded("weights" if trained == parameters else "trained weights", trained, width, recipe, 3, dtype, ranks),
        _sharded("frozen weights", parameters - trained, width, recipe, 3, dtype, ranks),
        _sharded("gradients", trained, summed, recipe, 2, "summed in float32" if summed == 4 else dtype, ranks),
        _sharded("optimiser", trained, moments, recipe, 1, states, ranks),
        Held("buffers", buffer_bytes, "averaged weights, tables, statistics: whole on each rank"),
    ]
    return [part for part in parts if part.size or part.name in ("gradients", "optimiser")]


def _optimiser_states(recipe: Recipe) -> tuple[int, str]:
    """Bytes a parameter, and what they are."""
    moments = {"adamw": 2, "sgd": int(recipe.optim.momentum > 0)}[recipe.optim.name]
    words = {0: "no moments", 1: "one moment", 2: "two moments"}[moments]
    # DeepSpeed's sharded and low-precision optimisers keep a float32 copy of the weights beside the moments.
    if recipe.compute.dtype == "fp32" and recipe.zero.stage == 0:
        return 4 * moments, words
    return 4 + 4 * moments, f"float32 weights, {words}"


def _sharded(name: str, count: int, width: int, recipe: Recipe, stage: int, content: str, ranks: int) -> Held:
    """A part of `width` bytes a parameter that each rank holds a share of from ZeRO `stage` on."""
    shards = ranks if recipe.zero.stage >= stage else 1
    host = name == "optimiser" and recipe.zero.stage > 0 and recipe.zero.offload == "cpu"
    where = f"over {shards} ranks" if shards > 1 else "whole on each rank"
    remark = f"{content}: {width} bytes a parameter, {where}{', in host memory' if host else ''}"
    return Held(name, count * width / shards, remark, host)
