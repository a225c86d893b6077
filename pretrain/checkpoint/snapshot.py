"""Host copies of what a checkpoint holds, so that training goes on while the bytes are written.

A copy costs one pass over memory; writing, making durable and hashing cost several, and wait for a disk.
"""

import copy
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """Copies of nested states in host memory that is reused from save to save.

    The memory stays taken between saves: fresh pages cost the kernel more time than the copy itself. Tensors that share
    a storage share its copy, so that what is written is byte for byte what the state itself would have given.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}
        self._used: list[Tensor] = []
        self._copied: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def begin(self) -> None:
        """Take back the memory of all copies made so far: they must not be in use any more."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault(buffer.nbytes, []).append(buffer)
        self._used, self._copied = [], {}

    def take(self, state: Any) -> Any:
        """Copy a state made of dicts, lists, tuples, tensors on any device, and small objects."""
        if isinstance(state, Tensor):
            return self._tensor(state)
        if isinstance(state, dict):
            made = copy.copy(state)  # keeps the class, and the attributes that state_dict() puts on its dictionary
            made.update({key: self.take(value) for key, value in state.items()})
            return made
        # Not named tuples and the like, whose constructors take their values one by one.
        if type(state) in (list, tuple):
            return type(state)(self.take(value) for value in state)
        return copy.deepcopy(state)

    def end(self) -> None:
        """Wait until the accelerator's copies have arrived, and let go of memory that was not needed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        # Only now: until the copies have arrived, what they are made of must not be freed and written anew. And by all
        # means: a freed storage's address is used again, and the next save would take the old bytes for the new.
        self._free, self._copied = {}, {}

    def _tensor(self, tensor: Tensor) -> Tensor:
        host = self._storage(tensor.untyped_storage()).untyped_storage()
        made = torch.empty(0, dtype=tensor.dtype).set_(host, tensor.storage_offset(), tensor.size(), tensor.stride())
        return made.requires_grad_(tensor.requires_grad)

    def _storage(self, storage: torch.UntypedStorage) -> Tensor:
        # The storage itself, since every view has a Python object of its own for it.
        key = storage._cdata
        if key not in self._copied:
            pinned = storage.device.type == "cuda"
            waiting = self._free.get(storage.nbytes(), [])
            host = waiting.pop() if waiting else torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            # With the storage, which is known by its address: that of a state made for the save alone, and freed, would
            # be another's by the next call.
            self._copied[key] = storage, host.copy_(content, non_blocking=pinned)
            self._used.append(host)
        return self._copied[key][1]
