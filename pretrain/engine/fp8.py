"""Matrix products of transformer blocks in 8-bit floating point (torchao), with scales that are taken anew each time.

Weights, their names, gradients and the optimiser stay as they are: only the product of a layer is another one. Layers
are not swapped for torchao's, which know neither the bias that attention hands over nor widths that are filled up.
Recipes: torchao's `tensorwise` has one scale for a whole tensor, `rowwise` one for each row. Experimental: tried out on
a CPU, where torchao imitates the arithmetic; `bench/gpu.py fp8` measures it.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pretrain.errors import RecipeError
from pretrain.models.linear import Linear
from pretrain.models.vit import ALIGNED, Attention, Mlp
from pretrain.objectives.base import Objective

logger = logging.getLogger(__name__)

#: Ada and later multiply 8-bit floating point: L40S, H100, B200.
LEAST_CAPABILITY = (8, 9)


class Fp8Product:
    """A product in FP8: tokens [..., inputs], weight [outputs, inputs], bias [outputs]; result in the tokens' format.

    Args:
        kind: torchao's recipe, tensorwise or rowwise.
        emulate: Imitate the arithmetic in the tokens' format, for devices without it.
    """

    def __init__(self, kind: str, emulate: bool = False) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        # Filled up: the number of tokens is an inner dimension of the weight's gradient, and need not be aligned.
        config = replace(Float8LinearConfig.from_recipe_name(kind), emulate=emulate, pad_inner_dim=True)
        # One layer without a weight of its own stands for all: it is called with theirs.
        holder = nn.Sequential(nn.Linear(ALIGNED, ALIGNED, bias=False, device="meta"))
        self._layer = convert_to_float8_training(holder, config=config)[0]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = functional_call(self._layer, {"weight": weight}, (x,))
        return product if bias is None else product + bias


def check_fp8(kind: str, device: torch.device) -> None:
    """Refuse FP8 where it can't be computed.

    Args:
        kind: compute.fp8 of the recipe.
        device: Of this rank.

    Raises:
        RecipeError: no such device, or no torchao.
    """
    if kind == "none":
        return
    least = ".".join(map(str, LEAST_CAPABILITY))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < LEAST_CAPABILITY:
        found = "no GPU" if capability is None else "compute capability " + ".".join(map(str, capability))
        raise RecipeError(f"compute.fp8: found {kind} on {device} ({found}), allowed: {least} or more, or none")
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"compute.fp8: {kind} needs torchao, which can't be imported ({error}): pip install 'tubelet[fp8]', or set "
            "compute.fp8=none"
        ) from error


def multiply_in_fp8(objective: Objective, kind: str, emulate: bool = False) -> list[str]:
    """Give the trained, aligned layers of the objective's blocks a product in FP8, in place, before they are compiled.

    Heads and embeddings keep theirs: rounding would show there, and they are small.

    Args:
        objective: In its engine or not.
        kind: compute.fp8 of the recipe; none: nothing happens.
        emulate: See `Fp8Product`.

    Returns:
        The layers' names.

    Raises:
        RecipeError: not one layer can have it.
    """
    if kind == "none":
        return []
    names = {part: name for name, part in objective.named_modules()}
    layers = {names[layer]: layer for part in objective.modules() for layer in _aligned_layers(part)}
    if not layers:
        raise RecipeError(
            f"compute.fp8: found {kind}, and the model has no blocks of pretrain/models/vit.py whose widths are "
            f"multiples of {ALIGNED}; allowed: none"
        )
    product = Fp8Product(kind, emulate)
    for layer in layers.values():
        layer.product = product
    logger.info("compute.fp8: %s products in %d layers: %s", kind, len(layers), ", ".join(layers))
    return list(layers)


def _aligned_layers(part: nn.Module) -> Iterator[Linear]:
    """Yield the layers of an attention or MLP whose rows are aligned; those of frozen weights are left as they are."""
    if isinstance(part, Attention):
        layers, widths = [part.qkv, part.proj], [part.proj.in_features]
    elif isinstance(part, Mlp):
        layers, widths = [part.fc1, part.fc2], [part.fc1.in_features, part.fc1.out_features + part.surplus("cuda")]
    else:
        return
    if all(width % ALIGNED == 0 for width in widths):
        yield from (layer for layer in layers if layer.weight.requires_grad)
