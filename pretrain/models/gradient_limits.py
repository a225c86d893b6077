"""Limits on gradients inside a network, which must know by what the loss is multiplied before it comes back."""

from dataclasses import dataclass

from torch import nn


@dataclass
class LossScale:
    """What a gradient in the network is of.

    Attributes:
        value: factor on the loss: that of fp16 training, else 1.
        rows: over which a rank's loss is a mean in a step; None: no engine trains the model.
    """

    value: float = 1.0
    rows: int | None = None

    def limit(self, published: float, rows: int) -> float:
        """Give a limit that was published for a mean over so many rows of a rank, for the loss as it is here.

        A row's gradient is as much smaller as there are rows, so a limit of one number would be another training on
        another number of ranks.
        """
        return published * self.value * (1.0 if self.rows is None else rows / self.rows)


class LimitedGradient(nn.Module):
    """Base of modules that limit gradients."""

    #: The one that the engine sets before each forward pass, where it trains the model.
    scale = LossScale()


def follow_loss_scale(model: nn.Module) -> LossScale:
    """Let all modules of a model that limit gradients follow the scale that is returned."""
    scale = LossScale()
    for module in model.modules():
        if isinstance(module, LimitedGradient):
            module.scale = scale
    return scale
