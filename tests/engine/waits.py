"""A detector of waits for the device, on a machine that has none.

Tensors of the device are told from those of the host by descent: parameters, buffers, what `copied` marks, and all
that is computed from them. Where such a value is read by the host, or data of the host goes in otherwise than by
`copied`, an accelerator would make the host wait until all work that was queued is done.
"""

import sys
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
#: The host reads a value, or needs it for the size of a result.
READS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten.unique_dim.default, aten._unique2.default, aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
#: Likewise, by methods that read past the dispatcher.
METHODS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}
#: Copies of lists, where a device is given.
COPIES = {torch.tensor, torch.as_tensor}
HOST, DEVICE = "host", "device"


class Waits:
    """Watch over what runs while this is open: `places` counts waits by "file:function" of the library at work."""

    def __init__(self, module: nn.Module) -> None:
        self.places: Counter[str] = Counter()
        self._kinds: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._modes = (_Functions(self), _Dispatched(self))
        for tensor in (*module.parameters(), *module.buffers()):
            self.mark(tensor, DEVICE)

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def mark(self, value: Any, kind: str) -> None:
        """Say where tensors are."""
        for tensor in tensors_in(value):
            self._kinds[tensor.untyped_storage()] = kind

    def kind(self, tensor: Tensor) -> str:
        """Say where a tensor is; empty: made from numbers alone, on either side."""
        return self._kinds.get(tensor.untyped_storage(), "")

    def note(self) -> None:
        """Count a wait."""
        self.places[_place()] += 1

    def seen(self, func: Any, given: Any, made: Any) -> None:
        """Judge an operation."""
        inputs = list(tensors_in(given))
        on_device = [tensor for tensor in inputs if self.kind(tensor) == DEVICE]
        if on_device:
            masked = func is aten.index.Tensor and any(tensor.dtype == torch.bool for tensor in inputs[1:])
            if func in READS or masked:
                self.note()
            # A number of the host is an argument of the kernel, but `where` copies it to the device.
            whole = func is aten.where.self
            if any(self.kind(tensor) != DEVICE and tensor.dim() == 0 for tensor in inputs) and whole:
                self.note()
            elif any(self.kind(tensor) == HOST and tensor.dim() > 0 for tensor in inputs):
                self.note()
        kind = DEVICE if on_device else HOST if any(self.kind(tensor) for tensor in inputs) else ""
        if func is aten.lift_fresh.default:
            kind = HOST
        if kind:
            self.mark(made, kind)


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.waits.seen(func, (args, kwargs), made)
        return made


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = func in METHODS and self.waits.kind(args[0]) == DEVICE
        if read or (func in COPIES and kwargs.get("device") is not None):
            self.waits.note()
        return func(*args, **kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested lists and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _place() -> str:
    frame = sys._getframe()
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        for package in ("/pretrain/", "/finetune/", "/deepspeed/"):
            _, found, inside = path.rpartition(package)
            if found:
                return f"{found[1:]}{inside}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
