"""Copies between the host and its device for which neither waits.

torch waits for all work that was queued before whenever memory of the host is pageable, and whenever a number is read
from the device by `float`, `bool` or `tolist`. Pinned memory is copied behind the work that is queued, and an event
tells when it is there. On a CPU nothing is copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.data.samples import Batch


class Numbers:
    """Numbers of the device, on their way to the host.

    Args:
        values: Any shape and type; what is queued later may overwrite them.
    """

    def __init__(self, values: Tensor) -> None:
        on_device, self._copied = values.detach().reshape(-1), None
        if values.device.type == "cpu":
            self._host = on_device.clone()
            return
        # torch keeps pinned memory for the next of the same size, so this allocates in the first step only.
        self._host = torch.empty(on_device.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(on_device, non_blocking=True)
        self._copied = torch.Event(device=values.device)
        self._copied.record()

    def read(self) -> list[float]:
        """Wait until they are there; what was queued behind them goes on meanwhile."""
        if self._copied is not None:
            self._copied.synchronize()
        found: list[float] = self._host.tolist()
        return found


def sent(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Send numbers of the host to the device, float64 [N]."""
    # Given a device, torch.tensor would copy from pageable memory.
    host = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type != "cpu")
    return host.to(device, non_blocking=True)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the batch's tensors to `device` behind what is queued there."""
    return {name: _moved(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _moved(value: Tensor, device: torch.device) -> Tensor:
    # The stream's tensors are pinned already; those that are made here, row keys for example, are not.
    if value.device.type == "cpu" and device.type != "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
