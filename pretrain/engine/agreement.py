"""What all ranks know of a step before its update: means of the metrics, and flags that any of them raised."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.transfers import Numbers, sent
from pretrain.runtime.process_group import Ranks


@dataclass(frozen=True)
class Flags:
    """What a rank reports beside its metrics.

    Attributes:
        stop: It was asked to stop.
        out_of_data: Its stream has ended.
        waited: Seconds that it waited for data.
        samples: Counts of its ledger (`BadSampleLedger.numbers`).
    """

    stop: bool
    out_of_data: bool
    waited: float
    samples: list[float]


@dataclass(frozen=True)
class Agreed:
    """The same on all ranks: means of the metrics and of seconds waited; sums of flags, above 0 where any rank has it.

    `nonfinite` counts the ranks whose loss is not finite.
    """

    metrics: dict[str, float]
    data_s: float
    nonfinite: float
    stop: float
    out_of_data: float
    samples: list[float]


class Agreement:
    """One small all-reduce of a step, that is queued on the device; its result comes to the host meanwhile.

    Args:
        metrics: This rank's, single numbers on the device, with `loss`.
        flags: This rank's.
        ranks: This process among all, which make it together.

    Attributes:
        loss: Mean over ranks, float64 [], on the device.
    """

    def __init__(self, metrics: dict[str, Tensor], flags: Flags, ranks: Ranks) -> None:
        self._names = list(metrics)
        reported = [float(flags.stop), float(flags.out_of_data), flags.waited / ranks.world_size, *flags.samples]
        nonfinite = (~metrics["loss"].isfinite()).double().reshape(1)
        # Metrics and flags in one tensor: every further all-reduce would wait for the slowest rank once more.
        packed = torch.cat(
            [
                torch.stack([metrics[name].reshape(()) for name in self._names]) / ranks.world_size,
                nonfinite,
                sent(reported, ranks.device),
            ]
        )
        if ranks.world_size > 1:
            dist.all_reduce(packed)
        self.loss = packed[self._names.index("loss")]
        self._numbers = Numbers(packed)

    def read(self) -> Agreed:
        """Wait for the result."""
        found = self._numbers.read()
        bad_losses, stop, out_of_data, data_s, *samples = found[len(self._names) :]
        metrics = dict(zip(self._names, found, strict=False))
        return Agreed(metrics, data_s, bad_losses, stop, out_of_data, samples)
