"""Moving average of the trained weights, kept in float32 beside a model in any format.

timm's ModelEmaV3 copies the model in the model's own format: in bfloat16, whose steps are 1/256 of a value, an average
with a decay of 0.9999 would never move. Here the averages are float32 buffers, so that DeepSpeed's checkpoints hold
them like any other part of the module. The warm-up of the decay is timm's (and TensorFlow's).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Attribute under which an objective holds its averages, and so the first part of their names in a checkpoint; dots in
#: the names of weights stand as |, because a buffer's name has none.
PREFIX = "average."


class WeightAverage(nn.Module):
    """Averages of a model's trainable parameters.

    Args:
        model: its parameters' present values are the first averages.
        decay: share that an average keeps at each update, once warm: min(decay, (1 + n) / (10 + n)) at update n.
    """

    updates: Tensor

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._names = {name.replace(".", "|"): name for name, p in model.named_parameters() if p.requires_grad}
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        parameters = dict(model.named_parameters())
        for key, name in self._names.items():
            self.register_buffer(key, parameters[name].detach().float().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never round to the model's format."""
        for key, buffer in self.named_buffers():
            moved = fn(buffer)
            setattr(self, key, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Start again from the model's present weights."""
        self.updates.zero_()
        for average, parameter in self._pairs(model):
            average.copy_(parameter)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights."""
        self.updates += 1
        # On the device, without waiting for it.
        keep = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay).float()
        for average, parameter in self._pairs(model):
            average.lerp_(parameter.float(), 1 - keep)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model computes with the averages inside of this context."""
        with torch.no_grad():
            live = [parameter.detach().clone() for _, parameter in self._pairs(model)]
            for average, parameter in self._pairs(model):
                parameter.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for value, (_, parameter) in zip(live, self._pairs(model), strict=True):
                    parameter.copy_(value)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, nn.Parameter]]:
        parameters = dict(model.named_parameters())
        for key, name in self._names.items():
            yield getattr(self, key), parameters[name]


def split_averages(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a checkpoint's state into what is no average, and the averages by the names of their weights."""
    averages = {
        name.removeprefix(PREFIX).replace("|", "."): value for name, value in state.items() if name.startswith(PREFIX)
    }
    return {name: value for name, value in state.items() if not name.startswith(PREFIX)}, averages
