"""Construction of a DeepSpeed engine from a recipe."""

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.checkpoint.deepspeed_files import Groups
from pretrain.engine.compiled_parts import compile_parts, fetch_by_part
from pretrain.engine.deepspeed_config import Config, builds_sharded, deepspeed_config
from pretrain.engine.fp8 import check_fp8, multiply_in_fp8
from pretrain.engine.model_states import ModelSize, size_of
from pretrain.engine.optimiser import build_optimizer, forget_steps
from pretrain.engine.turns import Turn, turns_of
from pretrain.errors import RecipeError
from pretrain.models.cross_rank_batch_norm import convert_batch_norm
from pretrain.models.dropout import Rows, draw_by_position
from pretrain.models.gradient_limits import LossScale, follow_loss_scale
from pretrain.models.initial_weights import read_weights
from pretrain.objectives.base import Method, Objective, WholeBatchObjective
from pretrain.runtime.determinism import compute_alike
from pretrain.runtime.gradient_cache import GradientCache
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.seeds import seed_everything

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A DeepSpeed engine, its configuration, the number of parameters of the model, and what the optimiser updates.

    `groups` are the names of the parameters in each of the optimiser's groups, which DeepSpeed forgets; `turns` the
    updates of one batch; `rows` what dropout is drawn by; `scale` what limits on gradients follow.
    """

    engine: Any
    config: Config
    parameters: int
    groups: Groups
    turns: list[Turn]
    cache: GradientCache | None
    rows: Rows
    scale: LossScale


def build_on_meta(method: Method) -> Objective:
    """Build a method's objective without memory, as plans need it.

    Raises:
        RecipeError: a parameter that can't be trained on every layout.
    """
    with torch.device("meta"):
        objective = method.build()
    # DeepSpeed 0.19 flattens gradients to sum them over ranks without ZeRO, and fails on one without dimensions.
    scalars = [name for name, value in objective.named_parameters() if value.requires_grad and value.ndim == 0]
    if scalars:
        raise RecipeError(
            f"{type(objective).__name__}: {', '.join(scalars)} has no dimensions, which DeepSpeed can't train on "
            "several ranks without ZeRO; allowed: shape [1], as in nn.Parameter(torch.zeros(1))"
        )
    return objective


def count_model(method: Method) -> ModelSize:
    """Count parameters, buffers and frozen towers of a method's objective, without memory.

    Raises:
        RecipeError: a parameter that can't be trained on every layout.
    """
    return size_of(build_on_meta(method))


def build_engine(method: Method, ranks: Ranks, accumulation: int, resumes: bool = False) -> Built:
    """Build objective, optimiser and DeepSpeed engine, with the recipe's first weights.

    Args:
        method: The run.
        ranks: This process among all.
        accumulation: Micro-batches of a step.
        resumes: A checkpoint will be loaded, so run.init_weights need not be.
    """
    import deepspeed

    recipe, parameters = method.recipe, count_model(method).parameters
    on_cpu = ranks.device.type == "cpu"
    if on_cpu and recipe.compute.dtype == "fp16":
        raise RecipeError("compute.dtype: found fp16, allowed on a CPU: bf16, fp32 (DeepSpeed has no fp16 there)")
    check_fp8(recipe.compute.fp8, ranks.device)
    config = deepspeed_config(recipe, accumulation, parameters, on_cpu)
    torch.set_float32_matmul_precision(recipe.compute.matmul)
    compute_alike(ranks.device, recipe.compute.deterministic)
    seed_everything(recipe.run.seed)
    objective = _build_objective(method, config, parameters)
    if objective.cross_rank_batch_norm:
        # Before the optimiser and the engine: both hold parts of the model.
        convert_batch_norm(objective, ranks)
    if recipe.run.init_weights and not resumes:
        path = recipe.run.init_weights
        objective.load_pretrained(path, read_weights(path, recipe.run.init_averaged))
    turns, cache = turns_of(objective), open_cache(objective, accumulation)
    rows, scale = draw_by_position(objective), follow_loss_scale(objective)
    optimizer = build_optimizer(recipe, objective, ranks.device)
    # Taken now: DeepSpeed makes flat tensors of the groups and forgets the names.
    groups = _group_names(objective, optimizer)
    if recipe.compute.compile and recipe.zero.stage == 3:
        fetch_by_part(objective)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=dict(config))
    move_buffers(engine.module, ranks.device)
    forget_steps(engine.basic_optimizer)
    multiply_in_fp8(objective, recipe.compute.fp8)
    if recipe.compute.compile:
        compile_parts(objective)
    return Built(engine, config, parameters, groups, turns, cache, rows, scale)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move buffers to the device of the weights.

    deepspeed.zero.Init wraps torch's constructors only, so positions and statistics made by NumPy stay on the CPU, and
    DeepSpeed moves no module that was built so: the first forward pass would fail.
    """
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            # Past the module's own _apply, which would make fixed tables anew.
            part._buffers[name] = buffer.to(device)


def open_cache(objective: Objective, accumulation: int) -> GradientCache | None:
    """Give a loss over the global batch what makes it exact over several micro-batches, where a step has them.

    Raises:
        RecipeError: the objective can't be cached: accumulated, its loss would be that of smaller batches.
    """
    if not objective.whole_batch or accumulation == 1:
        return None
    several = len(objective.turns) > 1
    if several or not isinstance(objective, WholeBatchObjective):
        other = "make its updates one turn" if several else "write the objective as a WholeBatchObjective"
        raise RecipeError(
            f"batch.micro: the loss of {type(objective).__name__} looks across the whole batch, and a step has "
            f"{accumulation} micro-batches on each rank: it would be another loss. Raise batch.micro or the number of "
            f"ranks until batch.samples = batch.micro x ranks, or {other}"
        )
    objective.cache = GradientCache(accumulation)
    return objective.cache


def _group_names(objective: Objective, optimizer: torch.optim.Optimizer) -> Groups:
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def _build_objective(method: Method, config: Config, parameters: int) -> Objective:
    import deepspeed

    sharded = builds_sharded(method.recipe, parameters)
    context = deepspeed.zero.Init(config_dict_or_path=dict(config)) if sharded else contextlib.nullcontext()
    if sharded:
        logger.info("building %d parameters in shards (deepspeed.zero.Init)", parameters)
    with context:
        return method.build()
