"""DeepSpeed's configuration, derived from the recipe."""

from pretrain.recipe.optimisers import describe_optimiser
from pretrain.recipe.schema import Recipe
from pretrain.runtime.dtypes import DTYPES

#: Parameters above which `zero.init: auto` builds a stage-3 model in shards.
ZERO_INIT_PARAMETERS = 500_000_000

#: Ranks above which gradients cross in float32. A ring sums as often as there are ranks: in bf16 the relative error of
#: the whole gradient is 0.4 % at 8 ranks, 0.9 % at 64 and 3.3 % at 1,024 (simulated).
BF16_SUM_RANKS = 64

#: Buckets that a model's gradients fill at least, so that sending overlaps, unless they would be smaller than this.
BUCKETS, LEAST_BUCKET_BYTES = 8, 25 * 2**20

Config = dict[str, object]


def deepspeed_config(recipe: Recipe, accumulation: int, parameters: int, on_cpu: bool) -> Config:
    """Build the dictionary for deepspeed.initialize.

    Args:
        recipe: The run.
        accumulation: Micro-batches that each rank adds up for one optimiser step.
        parameters: Parameters of the model; buckets larger than the model would only waste memory.
        on_cpu: No accelerator: nothing to overlap, no pinned memory.
    """
    config: Config = {
        "train_batch_size": recipe.batch.samples,
        "train_micro_batch_size_per_gpu": recipe.batch.micro,
        "gradient_accumulation_steps": accumulation,
        # Left to `clip_or_drop` (step.py) there, which also drops a gradient that is not finite.
        "gradient_clipping": 0.0 if unwrapped(recipe) else recipe.optim.clip_grad or 0.0,
        "communication_data_type": communication_dtype(recipe, ranks_of(recipe, accumulation)),
        "zero_optimization": _zero(recipe, parameters, on_cpu),
        # Optimisers are torch's own, also with offload: DeepSpeedCPUAdam would have to be compiled on the machine.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed calls every optimiser but Adam untested; tests/engine/test_optimisers.py tests ours with all stages.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if recipe.compute.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if recipe.compute.dtype == "fp16":
        # A loss scale of 0 is DeepSpeed's word for a dynamic one.
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "min_loss_scale": 1}
    if recipe.compute.dtype == "bf16" and recipe.zero.stage > 0:
        # Micro-batches are added up in float32: bf16 keeps 8 bits, and small gradients would vanish in the sum.
        # Without ZeRO DeepSpeed has no such option.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def ranks_of(recipe: Recipe, accumulation: int) -> int:
    """Count the ranks that share a step's samples when each accumulates so many micro-batches."""
    return recipe.batch.samples // (recipe.batch.micro * accumulation)


def communication_dtype(recipe: Recipe, ranks: int) -> str:
    """Choose the format in which gradients cross so many ranks: fp32, bf16 or fp16."""
    if recipe.zero.communication_dtype != "auto":
        return recipe.zero.communication_dtype
    return "fp32" if ranks > BF16_SUM_RANKS else recipe.compute.dtype


def unwrapped(recipe: Recipe) -> bool:
    """Tell whether torch's optimiser updates as it is: DeepSpeed has none then that checks and clips the gradient."""
    return recipe.zero.stage == 0 and recipe.compute.dtype == "fp32"


def _zero(recipe: Recipe, parameters: int, on_cpu: bool) -> Config:
    zero = recipe.zero
    element_bytes = DTYPES[recipe.compute.dtype].itemsize
    bucket = max(1, min(zero.bucket_mb * 2**20 // element_bytes, parameters))
    if not on_cpu:
        # A model that fits into one bucket would have its gradients sent when the backward pass is over.
        bucket = min(bucket, max(LEAST_BUCKET_BYTES // element_bytes, parameters // BUCKETS))
    bucket += bucket % 2  # ZeRO 1 and 2 refuse to start with an odd one, so a model with an odd head would not train
    section: Config = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap and not on_cpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if zero.stage > 0 and zero.offload == "cpu":
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    if zero.stage == 3:
        section["stage3_prefetch_bucket_size"] = bucket
        # DeepSpeed keeps up to a billion gathered parameters by default: all of ViT-g, and nothing would be saved.
        section["stage3_max_live_parameters"] = 2 * bucket
        section["stage3_max_reuse_distance"] = bucket
        if recipe.compute.activation_checkpointing:
            # Its own linear adds the bias in place into the product, which selective recomputation keeps: gradients
            # were 370 % off, and right only while biases are zero (tests/engine/test_recompute_gradients.py).
            section["memory_efficient_linear"] = False
    return section


def builds_sharded(recipe: Recipe, parameters: int) -> bool:
    """Tell whether the model is built inside deepspeed.zero.Init, so that no rank ever holds all of it."""
    if recipe.zero.stage < 3 or recipe.zero.init == "never":
        return False
    return recipe.zero.init == "always" or parameters > ZERO_INIT_PARAMETERS


def describe(recipe: Recipe, config: Config, world_size: int) -> list[str]:
    """Describe batch, precision and ZeRO for the log of the start, in one line each."""
    zero, batch = recipe.zero, recipe.batch
    sharded = {0: "nothing", 1: "optimiser", 2: "optimiser + gradients", 3: "optimiser + gradients + weights"}[
        zero.stage
    ]
    accumulated = " in bf16" if recipe.compute.dtype == "bf16" and zero.stage == 0 else " in float32"
    if recipe.compute.dtype == "fp16":
        accumulated = " in fp16"
    optimiser = describe_optimiser(recipe.optim)
    slower = ""
    if (zero.stage, recipe.compute.dtype, config["gradient_accumulation_steps"]) == (1, "bf16", 1) and world_size > 1:
        # DeepSpeed's BF16_Optimizer.
        slower = " (stage 1 sends no gradient in bf16 before the backward pass is over; zero.stage=2 does)"
    return [
        f"batch: {batch.samples} videos a step = {batch.micro} x {world_size} ranks x "
        f"{config['gradient_accumulation_steps']} accumulated; {batch.samples * recipe.input.views} clips",
        f"precision: {recipe.compute.dtype}, gradients accumulated{accumulated}, sent in "
        f"{config['communication_data_type']}, {optimiser} in float32",
        f"ZeRO stage {zero.stage}: shards {sharded} over {world_size} ranks{slower}; offload {zero.offload}; "
        f"DeepSpeed: {config['zero_optimization']}",
    ]
