"""Batch norm over the rows of all ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.errors import TrainingError
from pretrain.runtime.collectives import sum_with_gradient
from pretrain.runtime.process_group import Ranks


def convert_batch_norm(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Let every batch norm in `module` take its statistics of all ranks' rows.

    On accelerators these are torch's SyncBatchNorm, on the CPU `CrossRankBatchNorm`. Parameters and buffers stay the
    same objects under the same names, so optimisers and checkpoints see no difference. One rank alone keeps its module.

    Args:
        module: Changed in place; call it before the engine is built.
        ranks: This process among all.

    Returns:
        `module`, or its replacement where it is a batch norm itself.

    Raises:
        TrainingError: a batch norm of a class that neither torch nor timm has, whose forward pass would be lost.
    """
    if ranks.world_size == 1:
        return module
    plain, with_activation = _known_classes(module)
    for name, part in module.named_modules():
        # By exact class: a subclass may have a forward pass of its own, which a conversion would drop without a word.
        if isinstance(part, _BatchNorm) and type(part) not in (*plain, *with_activation):
            allowed = ", ".join(kind.__name__ for kind in (*plain, *with_activation))
            raise TrainingError(
                f"batch norm over ranks: {name or 'the module'} is a {type(part).__name__}, allowed: {allowed}"
            )
    if ranks.device.type == "cpu":
        return _convert(module, ranks)
    if with_activation:
        from timm.layers.norm_act import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def _known_classes(module: nn.Module) -> tuple[tuple[type, ...], tuple[type, ...]]:
    """List classes of torch, and those of timm that have dropout and activation inside, where `module` has any."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, CrossRankBatchNorm)
    if not any(type(part).__module__.startswith("timm.") for part in module.modules()):
        return plain, ()
    from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct

    return plain, (BatchNormAct2d, SyncBatchNormAct)


def _convert(module: nn.Module, ranks: Ranks) -> nn.Module:
    converted = CrossRankBatchNorm(module, ranks) if isinstance(module, _BatchNorm) else module
    for name, child in module.named_children():
        converted.add_module(name, _convert(child, ranks))
    return converted


class CrossRankBatchNorm(_BatchNorm):
    """Batch norm over all ranks by sums that any backend knows, gloo on CPU tensors included.

    Equal to torch's batch norm of the whole batch in outputs, gradients and running statistics, for any split of the
    rows, also where a rank has none. Statistics are float32, in bf16 models as well, and float64 in float64 models.
    In eval mode no rank waits for another.

    Args:
        norm: What to replace; its parameters and buffers are taken over. Modules inside of it (timm's dropout and
            activation) are applied to the result.
        ranks: This process among all.
    """

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        # The same objects: the optimiser, ZeRO and checkpoints may hold them already.
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training
        self._ranks = ranks
        self._keep_wide(self._buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never round the running statistics: in bfloat16 steps below 1/256 of a value would be lost."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._keep_wide(before)
        return self

    def _keep_wide(self, values: dict[str, Tensor | None]) -> None:
        for name, moved in self._buffers.items():
            value = values[name]
            if moved is not None and value is not None and moved.is_floating_point():
                kind = torch.promote_types(moved.dtype, torch.float32)
                self._buffers[name] = moved if moved.dtype == kind else value.to(moved.device, kind)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise TrainingError(
                f"batch norm over ranks: found an input of shape {tuple(input.shape)}, allowed: [B, "
                f"{self.num_features}, ...]"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, ...].

        Raises:
            TrainingError: another shape, or fewer than two values a channel on all ranks together in training.
        """
        self._check_input_dim(input)
        # bfloat16 has 8 bits, so a mean of many values would be rounded to 1/256 of itself before it is subtracted.
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        if self.training:
            mean, variance, count = self._statistics(wide, self._ranks)
            self._take_in(mean.detach(), variance.detach(), count)
        elif self.running_mean is not None and self.running_var is not None:
            mean, variance = self.running_mean, self.running_var
        else:
            # Evaluation may give ranks different numbers of batches; a sum over ranks would wait for ever.
            mean, variance, _ = self._statistics(wide, None)
        shape = (1, -1, *[1] * (input.dim() - 2))
        output = (wide - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            output = output * self.weight.to(wide.dtype).view(shape) + self.bias.to(wide.dtype).view(shape)
        output = output.to(input.dtype)
        for module in self.children():
            output = module(output)
        return output

    def _statistics(self, rows: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor, float]:
        """Compute mean and biased variance of each channel [C], with gradient, and the number of values behind them."""

        def total(values: Tensor) -> Tensor:
            return values if ranks is None else sum_with_gradient(values, ranks)

        channels_last = rows.movedim(1, -1).flatten(0, -2)
        # float64: float32 counts no further than 16.8 million values, a few videos' worth.
        sums = total(
            torch.cat([channels_last.sum(0).double(), channels_last.new_tensor([len(channels_last)]).double()])
        )
        count = float(sums[-1])
        if count < 2:
            raise TrainingError(
                f"batch norm over ranks: found {count:.0f} values a channel on all ranks together, needs 2 in training"
            )
        mean = (sums[:-1] / count).to(rows.dtype)
        # Squares of what is left after the mean: a mean of squares less a squared mean cancels where the mean is large.
        variance = total((channels_last - mean).square().sum(0)) / count
        return mean, variance, count

    @torch.no_grad()
    def _take_in(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Update the running statistics as torch does, with the unbiased variance."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # momentum=None is torch's cumulative average.
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), share)
