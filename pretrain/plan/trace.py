"""The work of a step's forward and backward pass, or passes, counted on tensors without content.

The recipe's own objective runs on torch's fake tensors, which have shapes and no memory, so what is counted is what
training does: fused attention, visible cubes only, recomputed activations. A billion parameters take a few seconds.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pretrain.data.samples import Batch
from pretrain.engine.build import build_on_meta
from pretrain.engine.turns import turns_of
from pretrain.models.vit import Attention
from pretrain.objectives.base import Method
from pretrain.runtime.dtypes import DTYPES

#: Parts by a piece of a module's path, the first that matches; what no module does is the objective's own arithmetic.
PARTS = (("decoder", "decoder"), ("patch_embed", "embedding"), ("attn", "attention"), ("mlp", "MLP"))
REST, TARGETS, BACKWARD = "norms and the rest", "targets and loss", "backward"


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


#: torch's own counts; its table lacks the fused attention that fake tensors of the CPU choose.
FLOPS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@dataclass(frozen=True)
class Operation:
    """One kernel: floating point operations (a multiply-add is two), and bytes read and written.

    `recomputed`: of the backward pass, which repeats it for activation checkpointing.
    """

    part: str
    flops: float
    bytes: float
    recomputed: bool = False


@dataclass(frozen=True)
class Trace:
    """A forward and backward pass of one micro-batch, one of each for every turn of the objective.

    Attributes:
        clips: clips in the micro-batch.
        operations: kernels in their order; those of the backward pass have the part `backward`.
        peak_bytes: most memory held at once beside weights and accumulated gradients: activations and temporaries.
        largest_bytes: largest single tensor.
        batch_bytes: the micro-batch itself, as it comes from the data workers; part of `peak_bytes`.
    """

    clips: int
    operations: list[Operation]
    peak_bytes: int
    largest_bytes: int
    batch_bytes: int

    def flops(self, part: str | None = None) -> float:
        """Count the operations of one part, or of all."""
        return sum(operation.flops for operation in self.operations if part in (None, operation.part))

    def bytes(self, part: str | None = None) -> float:
        """Count the bytes read and written, of one part or of all."""
        return sum(operation.bytes for operation in self.operations if part in (None, operation.part))

    @property
    def forward_flops(self) -> float:
        """Of the forward pass."""
        return self.flops() - self.flops(BACKWARD)

    @property
    def model_flops(self) -> float:
        """Of the model's own work, which MFU counts: nothing that is recomputed, and no gradient of frozen weights."""
        backward = sum(each.flops for each in self.operations if each.part == BACKWARD and not each.recomputed)
        # Two forward passes at most: fused attention computes its scores again as well.
        return self.forward_flops + min(backward, 2 * self.forward_flops)

    @property
    def parts(self) -> list[str]:
        """In the order in which they begin."""
        return list(dict.fromkeys(operation.part for operation in self.operations))


def trace_step(method: Method, micro: int, on_cpu: bool = False) -> Trace:
    """Run one forward and backward pass of `micro` videos on fake tensors, for each turn of the objective.

    Args:
        method: the run.
        micro: samples of the micro-batch.
        on_cpu: choose kernels as a CPU does; else as an accelerator.
    """
    objective = build_on_meta(method).to(DTYPES[method.recipe.compute.dtype])
    towers = objective.frozen_parts().values()
    for tower in towers:
        tower.build_empty()
    made_up = method.example(micro)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = objective.to_empty(device="cpu")
        for tower in towers:
            tower.module().to_empty(device="cpu")
        batch: Batch = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in made_up.items()
        }
        for parameter in filter(lambda parameter: parameter.requires_grad, module.parameters()):
            # Accumulated gradients are ZeRO's to place: counted with the model's states, not here.
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        counter = _Counter(module, batch)
        with counter, _parts_noted(module, counter), _attention_of(on_cpu):
            for turn in turns_of(module):
                with turn.taken(module):
                    counter.part = TARGETS
                    loss = module(batch).loss
                    counter.part = BACKWARD
                    loss.backward()
                    del loss  # a turn's graph is gone when the next one begins
    size = sum(_size(value) for value in made_up.values() if isinstance(value, Tensor))
    return Trace(micro * method.recipe.input.views, counter.operations, counter.peak, counter.largest, size)


@contextmanager
def _attention_of(cpu: bool) -> Iterator[None]:
    """Let attention choose the kernels of a CPU, or of an accelerator, while this is open."""
    before, Attention.written_out = Attention.written_out, cpu
    try:
        yield
    finally:
        Attention.written_out = before


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Counter(TorchDispatchMode):
    """Counter of every kernel's work, and of the memory that is alive."""

    def __init__(self, module: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.part = TARGETS
        self.recomputing = 0
        self.operations: list[Operation] = []
        self.peak = self.largest = self._alive = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in (*module.parameters(), *module.buffers()):
            # Weights are there before and after: the model's states count them.
            self._known[tensor.untyped_storage()] = 0
        for value in batch.values():
            if isinstance(value, Tensor):
                self._hold(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in made if self._hold(tensor)]
        if new or func._schema.is_mutable:  # else a view
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            count = FLOPS.get(func._overloadpacket)
            flops = float(count(*args, **kwargs, out_val=output)) if count else 0.0
            moved = float(sum(map(_size, given + new)))
            self.operations.append(Operation(self.part, flops, moved, self.recomputing > 0))
        return output

    def _hold(self, tensor: Tensor) -> bool:
        """Count the storage of a tensor while it lives; tell whether it is a new one."""
        # Storages, not tensors: views share one, which lives as long as the last of them.
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        size = self._known[storage] = storage.nbytes()
        self._alive += size
        self.peak, self.largest = max(self.peak, self._alive), max(self.largest, size)
        weakref.finalize(storage, self._release, size)
        return True

    def _release(self, size: int) -> None:
        self._alive -= size


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _parts_noted(module: nn.Module, counter: _Counter) -> Iterator[None]:
    """Let `counter.part` follow the module whose forward pass runs, while this is open."""
    above: list[str] = []

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            above.append(counter.part)
            # What is recomputed in the backward pass is part of it.
            if counter.part == BACKWARD:
                counter.recomputing += 1
            else:
                counter.part = _part_of(name, counter.part)

        return hook

    def leave(*_: Any) -> None:
        counter.part = above.pop()
        counter.recomputing -= counter.part == BACKWARD

    handles = []
    for name, child in module.named_modules():
        handles += [child.register_forward_pre_hook(enter(name))]
        # Always: recomputing ends with an exception as soon as all is there that the backward pass needs.
        handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part_of(name: str, current: str) -> str:
    if not name.startswith("model"):
        return current
    words = name.split(".")
    return next((part for word, part in PARTS if word in words), REST)
