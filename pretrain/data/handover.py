"""The way of a micro-batch from a data worker to its rank: one piece of shared memory, written once, taken over once.

torch's queue copies each tensor of a batch to shared memory of its own, and the rank fetches them one by one, each by a
connection to the worker. Here samples are joined in shared memory, and all tensors of a batch are parts of one.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

#: Where a tensor lies in its batch's memory is a multiple of this, bytes: a cache line, and every data type's own.
ALIGNMENT = 64


@dataclass(frozen=True)
class BatchPart:
    """Place of a tensor in the memory of its batch: first byte, data type, shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Handover:
    """A micro-batch on its way.

    Attributes:
        memory: uint8 [bytes], shared by worker and rank.
        entries: the batch by name; a `BatchPart` where a tensor lies in `memory`, else the entry itself.
    """

    memory: torch.Tensor
    entries: dict[str, Any]

    def pin_memory(self) -> "Handover":
        """Copy to page-locked memory, in one piece; torch's DataLoader calls it where there is an accelerator."""
        pinned = {
            name: entry.pin_memory() if isinstance(entry, torch.Tensor) else entry
            for name, entry in self.entries.items()
        }
        return Handover(self.memory.pin_memory(), pinned)

    def batch(self) -> dict[str, Any]:
        """Give the batch, its tensors as parts of `memory`."""
        return {
            name: _part_of(self.memory, entry) if isinstance(entry, BatchPart) else entry
            for name, entry in self.entries.items()
        }


def join(columns: dict[str, list[np.ndarray]]) -> dict[str, torch.Tensor]:
    """Join the arrays [rows, ...] of each name to a tensor, one after the other.

    In a data worker they are written straight into memory that is shared with the rank; elsewhere a single array is not
    copied at all.
    """
    if get_worker_info() is None:
        return {
            name: torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
            for name, arrays in columns.items()
        }
    parts, size = _layout(columns)
    memory = _shared_memory(size)
    tensors = {name: _part_of(memory, part) for name, part in parts.items()}
    for name, arrays in columns.items():
        np.concatenate(arrays, out=tensors[name].numpy())
    return tensors


def hand_over(batch: dict[str, Any]) -> "Handover | dict[str, Any]":
    """Prepare a worker's batch for its way: what `join` has put into one memory travels as one tensor.

    What a kind of sample has added by itself goes as torch sends it; a batch without any such tensor stays as it is.
    """
    shared = [value for value in batch.values() if isinstance(value, torch.Tensor) and _is_part(value)]
    if not shared:
        return batch
    # The largest: a kind may have joined some of its arrays apart.
    storage = max((tensor.untyped_storage() for tensor in shared), key=lambda one: one.nbytes())
    memory = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]

    def entry(value: Any) -> Any:
        own = not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() != storage.data_ptr()
        if own or not _is_part(value):
            return value
        return BatchPart(value.storage_offset() * value.element_size(), value.dtype, tuple(value.shape))

    return Handover(memory, {name: entry(value) for name, value in batch.items()})


def _is_part(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor can travel as a part: shared, and told by offset and shape alone."""
    return tensor.is_shared() and tensor.is_contiguous()


def _layout(columns: dict[str, list[np.ndarray]]) -> tuple[dict[str, BatchPart], int]:
    """Lay out one tensor after the other; also the bytes of all."""
    parts, end = {}, 0
    for name, arrays in columns.items():
        dtype = torch.from_numpy(np.empty(0, np.result_type(*arrays))).dtype
        shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
        parts[name] = BatchPart(end, dtype, shape)
        end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return parts, end


def _shared_memory(size: int) -> torch.Tensor:
    # As torch's own default_collate does in a worker; `share_memory_` would copy, which is what this is to spare.
    storage = torch.UntypedStorage._new_shared(max(size, 1))  # no memory at all can't be mapped
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload,no-any-return]


def _part_of(memory: torch.Tensor, part: BatchPart) -> torch.Tensor:
    size = math.prod(part.shape) * part.dtype.itemsize
    return memory[part.offset : part.offset + size].view(part.dtype).view(part.shape)
