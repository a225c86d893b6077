"""Linear layers of transformers, and how their weights begin: in the constructor, for the reason that vit.py gives."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

#: Fills a weight in place.
Initializer = Callable[[Tensor], Tensor]

#: Tokens [..., inputs] times a weight [outputs, inputs], plus a bias [outputs].
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def xavier(weight: Tensor) -> Tensor:
    """Fill Xavier-uniform: the official pre-training models."""
    return nn.init.xavier_uniform_(weight)


def truncated_normal(weight: Tensor) -> Tensor:
    """Fill with deviation 0.02, cut at an absolute 2: the official classifiers and image models."""
    return nn.init.trunc_normal_(weight, std=0.02)


class Linear(nn.Linear):
    """Linear layer with zero bias, a slot `update` whose output is added to its own, and another `product` if given."""

    update: nn.Module | None
    product: Product | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool = True, init: Initializer = xavier) -> None:
        self.init = init  # before the base class, whose constructor calls reset_parameters
        super().__init__(inputs, outputs, bias)
        self.register_module("update", None)

    def reset_parameters(self) -> None:
        self.init(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._updated(x, self._multiply(x, self.weight, self.bias))

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # F.linear is looked up at each call: deepspeed.zero.Init puts a function of its own there.
        return F.linear(x, weight, bias) if self.product is None else self.product(x, weight, bias)

    def _updated(self, x: Tensor, y: Tensor) -> Tensor:
        # The update's module is called, not its weights read: stage 3 gathers them only there.
        return y if self.update is None else y + self.update(x)


class WidenedLinear(Linear):
    """Linear layer that can be asked for more inputs and outputs, whose weights are zero."""

    def forward(self, x: Tensor, inputs: int = 0, outputs: int = 0) -> Tensor:
        if not inputs and not outputs:
            return super().forward(x)
        bias = None if self.bias is None else F.pad(self.bias, (0, outputs))
        return self._multiply(x, F.pad(self.weight, (0, inputs, 0, outputs)), bias)


class JointProjection(Linear):
    """Query, key and value projection [3C, C], drawn as one matrix; without an own bias it is given one."""

    def __init__(self, dim: int, bias: bool = False, init: Initializer = xavier) -> None:
        super().__init__(dim, 3 * dim, bias, init)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._updated(x, self._multiply(x, self.weight, self.bias if bias is None else bias))
