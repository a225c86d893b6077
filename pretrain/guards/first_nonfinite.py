"""Search for the module in which a value first stops being finite: in weights, a forward pass, or a backward pass."""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: How the module itself is called, whose dotted name is empty.
ROOT = "objective"


@dataclass(frozen=True)
class NonFinite:
    """The first place where something is not finite.

    Attributes:
        phase: weights, forward or backward.
        module: Dotted name of the module that made it.
        text: What was seen, in a sentence.
        clips: Numbers in the micro-batch of the clips that have it, where that can be told.
    """

    phase: str
    module: str
    text: str
    clips: tuple[int, ...] = ()


@dataclass
class Activation:
    """Output of one module: largest magnitude and root mean square of its finite values, count of the others."""

    largest: float
    rms: float
    nonfinite: int


@dataclass
class FirstNonFinite:
    """Watch over one forward and backward pass of a module. A context manager: the hooks go when it ends.

    Attributes:
        activations: By dotted name, in the order in which modules finish.
        finding: The first value that was not finite.
    """

    module: nn.Module
    clips: int
    activations: dict[str, Activation] = field(default_factory=dict)
    finding: NonFinite | None = None
    _handles: list[Any] = field(default_factory=list)
    _last_sound: str = ""

    def __enter__(self) -> "FirstNonFinite":
        for name, part in self.module.named_modules():
            before = functools.partial(self._before, name)
            after = functools.partial(self._after, name)
            self._handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(part.register_forward_hook(after, with_kwargs=True))
        for name, parameter in self.module.named_parameters():
            # torch refuses a hook on a tensor that gets no gradient.
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(functools.partial(self._parameter_gradient, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        bad = [value for value in tensors((args, kwargs)) if not _finite(value)]
        if bad and self.finding is None:
            maker = name.rpartition(".")[0] or ROOT
            text = f"what {maker} hands to {name or ROOT} is not finite ({_count(bad)}): its own code made it"
            self.finding = NonFinite("forward", maker, text, _clips(bad[0], self.clips))

    def _after(self, name: str, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        values = list(tensors(output))
        if not values:
            return
        self.activations[name or ROOT] = _describe(values)
        bad = [value for value in values if not _finite(value)]
        if bad and self.finding is None:
            text = f"the output of {name or ROOT} is not finite ({_count(bad)}), its input is"
            self.finding = NonFinite("forward", name or ROOT, text, _clips(bad[0], self.clips))
        for value in values:
            if value.requires_grad:
                value.register_hook(functools.partial(self._output_gradient, name or ROOT))

    def _output_gradient(self, name: str, gradient: Tensor) -> None:
        if _finite(gradient):
            self._last_sound = name
        elif self.finding is None:
            # Only the first: whatever is behind it in the pass is not finite either.
            maker = self._last_sound or ROOT
            text = f"the gradient with respect to the output of {name} is not finite: made in the backward of {maker}"
            self.finding = NonFinite("backward", maker, text, _clips(gradient, self.clips))

    def _parameter_gradient(self, name: str, gradient: Tensor) -> None:
        if not _finite(gradient) and self.finding is None:
            text = f"the gradient of {name} is not finite ({_count([gradient])})"
            self.finding = NonFinite("backward", name.rpartition(".")[0] or ROOT, text)


def bad_weights(module: nn.Module) -> NonFinite | None:
    """Find the first parameter or buffer that is not finite."""
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if not _finite(value):
            return NonFinite("weights", name.rpartition(".")[0] or ROOT, f"{name} is not finite ({_count([value])})")
    return None


def function_without_gradient(loss_of: Callable[[], Tensor]) -> str | None:
    """Name the operation whose backward gives NaN, as torch's anomaly mode does; None where it finds none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autograd.detect_anomaly():
                loss_of().backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _count(values: list[Tensor]) -> str:
    bad = sum(int((~value.isfinite()).sum()) for value in values)
    return f"{bad} of {sum(value.numel() for value in values)} values"


def _clips(value: Tensor, clips: int) -> tuple[int, ...]:
    # Where the first dimension counts something else, windows for example, its rows are no clips to blame.
    if value.dim() < 2 or len(value) != clips:
        return ()
    rows = (~value.detach().isfinite()).flatten(1).any(1)
    return tuple(torch.nonzero(rows).flatten().tolist())


def _describe(values: list[Tensor]) -> Activation:
    line = torch.cat([value.detach().float().flatten() for value in values])
    sound = line[line.isfinite()]
    if not len(sound):
        return Activation(0.0, 0.0, len(line))
    # In float64: the square of a float32 above 1.8e19 is infinite in its own format.
    rms = float(sound.double().square().mean().sqrt())
    return Activation(float(sound.abs().max()), rms, len(line) - len(sound))
