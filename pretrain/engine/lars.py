"""LARS: stochastic gradient descent whose step is scaled to the norm of each tensor."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling, arXiv 1708.03888, as self-supervised training uses it (MoCo v3, SNCLR).

    For a tensor p with gradient g, in a group that adapts: g <- g + weight_decay p; g <- trust |p| / |g| g, where
    neither norm is 0. Then m <- momentum m + g; p <- p - lr m. Groups whose `decay_scale` is 0 (biases, norms) take
    plain steps: their norms say nothing about a good length of step.

    timm's Lars divides by |g| + weight_decay |p| instead of |g + weight_decay p|, and adapts no tensor at all where
    the weight decay is 0, which is another training run.

    Args:
        params: groups with `decay_scale`, as `parameter_groups` makes them.
        lr: learning rate.
        momentum: of the scaled gradient; 0: no state.
        weight_decay: added to the gradient.
        trust: coefficient of the ratio of norms.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, momentum: float, weight_decay: float, trust: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "decay_scale": 1.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, a few kernels for each group and no wait for the device."""
        if closure is not None:
            raise ValueError("Lars takes no closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if group["decay_scale"] > 0:
            # A copy: the gradients themselves are still wanted, for incidents and by whoever looks at them.
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
            torch._foreach_mul_(gradients, _ratios(parameters, gradients, group["trust"]))
        if group["momentum"] > 0:
            gradients = self._with_momentum(parameters, gradients, group["momentum"])
        torch._foreach_add_(parameters, gradients, alpha=-group["lr"])

    def _with_momentum(self, parameters: list[Tensor], gradients: Any, momentum: float) -> list[Tensor]:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return buffers


def _ratios(parameters: list[Tensor], gradients: list[Tensor], trust: float) -> list[Tensor]:
    """Compute each tensor's trust ratio; 1 where it has no norm (a layer that starts at zero), or its gradient none."""
    sizes, slopes = torch._foreach_norm(parameters), torch._foreach_norm(gradients)
    return [
        # On the device: an `if` on a norm would wait for it, once a tensor and step, and so would torch.where, which
        # copies its 1.0 there.
        (trust * size / slope).masked_fill(~((size > 0) & (slope > 0)), 1.0)
        for size, slope in zip(sizes, slopes, strict=True)
    ]
