"""Moving averages of a model's weights and statistics, in float32 beside it, and teachers that compute with them.

timm's ModelEmaV3 copies the model in the model's own format: in bfloat16, whose steps are 1/256 of a value, an average
with a decay of 0.9999 would never move. Here the averages are float32 buffers, so that DeepSpeed's checkpoints hold
them like any other part of the module. Where ZeRO stage 3 shards the weights, each rank keeps and updates the averages
of its own shards, and nothing is gathered for an update.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.sharded_buffers import ShardedBuffers, share_of
from pretrain.errors import TrainingError
from pretrain.models.base import MODEL

#: Attribute under which an objective holds the averages of its model, and so their first name in a checkpoint.
AVERAGE = "average"

#: Values that are converted to float32 at a time, so that an update needs no second copy of the model. On CPUs more
#: than the allocator uses again would cost new pages at each update (measured: 2.5 times the seconds with 2**22).
CHUNK, CPU_CHUNK = 2**26, 2**20


class WeightAverage(ShardedBuffers):
    """Averages of a model's trainable parameters, and of the statistics of its norms.

    Statistics that follow the live weights belong to other activations than those of averaged weights. So whatever is
    a floating-point buffer and saved with the model is averaged like a weight, as timm's ModelEmaV2 and ModelEmaV3 do;
    counts are the model's own.

    Args:
        model: Its present values are the first averages.
        decay: Share that an average keeps at each update; None: each update says.
        warmup: Start with a smaller decay: min(decay, (1 + n) / (10 + n)) at update n, as TensorFlow does. The official
            recipes don't, and timm's ModelEmaV3 has another curve, min(decay, 1 - n^(-2/3)).
        statistics: Whether buffers are averaged; a momentum teacher's are of its own forward passes.
    """

    updates: Tensor

    def __init__(
        self, model: nn.Module, decay: float | None = None, warmup: bool = False, statistics: bool = True
    ) -> None:
        super().__init__()
        self.decay, self.warmup = decay, warmup
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        kept = _statistics(model) if statistics else {}
        # torch refuses dots in a buffer's name.
        self._names = {name.replace(".", "|"): name for name in (*trained, *kept)}
        # On the host, where the decay is computed: no update waits for an accelerator.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device="cpu"))
        for key, name in self._names.items():
            value: Tensor = kept[name] if name in kept else trained[name]
            if name in trained:  # buffers are whole on every rank, in every stage
                self.shapes[key] = torch.Size(getattr(value, "ds_shape", value.shape))
            # A clone: .float() of a float32 weight is the weight itself, and its average would follow every update.
            self.register_buffer(key, _held(value).float().clone())
        self.is_split = any(hasattr(parameter, "ds_tensor") for parameter in trained.values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never round to the model's format; the count stays on the host."""
        for key in self._names:
            buffer = getattr(self, key)
            moved = fn(buffer)
            setattr(self, key, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Start again from the model's present weights."""
        self.updates.zero_()
        torch._foreach_copy_(*self.matched(model))

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None) -> None:
        """Take in the model's present weights.

        Args:
            model: Of which these are averages.
            decay: Share that the averages keep, where a schedule says (momentum teachers); default: the own one.
        """
        self.updates += 1
        share = self._share_taken(self.decay if decay is None else decay)
        for averages, weights in _chunks(*self.matched(model)):
            # `share` is a number of the host: with a tensor on the accelerator torch falls back to a loop.
            torch._foreach_lerp_(averages, _as_float32(weights), share)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let the model compute with the averages inside of this context; afterwards it is what it was, bit for bit.

        All ranks enter it together. Around a forward pass whose gradient is needed it is of no use: leaving it changes
        the weights that the backward pass reads.
        """
        averages, weights = self.matched(model)
        live = [weight.clone() for weight in weights]
        overwrite(model, weights, averages)
        try:
            yield
        finally:
            overwrite(model, self.matched(model)[1], live)

    def matched(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """Pair the averages with what this rank holds of the model, in one order; all are views of the originals."""
        values: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = [values[name] for name in self._names.values()]
        if any(hasattr(weight, "ds_tensor") for weight in weights):
            self.split(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return [getattr(self, key) for key in self._names], [_held(weight) for weight in weights]

    def _share_taken(self, decay: float | None) -> float:
        """Compute the share of the present weights in an update."""
        if decay is None:
            raise ValueError("an average without a decay of its own needs one at each update")
        if not self.warmup:
            return 1.0 - decay
        keep = ((1 + self.updates) / (10 + self.updates)).clamp(max=decay)
        return float(1 - keep)


class MomentumTeacher(nn.Module):
    """A second model whose weights are averages of the first one's, for targets without gradient (MoCo, BYOL, SNCLR).

    The averages are float32; the second model, in the format of the first, is rewritten from them after each update.
    Its frozen parameters, and its buffers, such as statistics of norms, are its own after the start. Stage 3 shards
    and gathers it like the first one.

    Args:
        model: The first one.
        twin: The second one, built like the first; it takes over the first one's parameters and buffers.

    Raises:
        TrainingError: the second one has other parameters or buffers.
    """

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        _check_twin(model, twin)
        self.average = WeightAverage(model, statistics=False)
        self.twin = twin.requires_grad_(False)
        self.reset(model)

    @torch.no_grad()
    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the second model."""
        return self.twin(*arguments, **options)

    @torch.no_grad()
    def reset(self, model: nn.Module) -> None:
        """Start again from the first model as it is: after pre-trained weights were loaded, for example."""
        ours, theirs = dict(self.twin.named_parameters()), dict(model.named_parameters())
        overwrite(self.twin, [_held(ours[name]) for name in theirs], [_held(weight) for weight in theirs.values()])
        for name, buffer in self.twin.named_buffers():
            buffer.copy_(model.get_buffer(name))
        # Only trained parameters have averages; frozen ones and buffers were copied above.
        self.average.reset(model)

    def update(self, model: nn.Module, decay: float) -> None:
        """Follow the first model: keep the share `decay` of what is there."""
        self.average.update(model, decay)
        averages, weights = self.average.matched(self.twin)
        overwrite(self.twin, weights, averages)


@torch.no_grad()
def overwrite(model: nn.Module, held: list[Tensor], values: list[Tensor]) -> None:
    """Copy `values` into what this rank holds of a model's weights, for forward passes to see; all ranks call it.

    Stage 3 keeps small parameters gathered between forward passes: they are gathered again, as at each of its steps.
    """
    torch._foreach_copy_(held, values)
    gathered: list[Any] = [
        parameter
        for parameter in model.parameters()
        if hasattr(parameter, "ds_status") and parameter.ds_status.name == "AVAILABLE"
    ]
    if gathered:
        # has_been_updated: the gathered copy is thrown away, else it would overwrite the shard that was just written.
        gathered[0].partition(gathered, has_been_updated=False)
        gathered[0].all_gather(gathered)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Find the buffers that are averaged, by name: of floating point, and saved with the model."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in model.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set and buffer.is_floating_point()
    }


def _check_twin(model: nn.Module, twin: nn.Module) -> None:
    """Refuse a second model that is built otherwise: what is copied would be broadcast, or be left as drawn."""
    ours, theirs = _shapes(model), _shapes(twin)
    if ours != theirs:
        names = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        lines = [f"{name} {ours.get(name, 'missing')} -> {theirs.get(name, 'missing')}" for name in names[:5]]
        raise TrainingError(
            f"momentum teacher: the second model differs from the first in {len(names)} parameters and buffers: "
            f"{', '.join(lines)}{', ...' if len(names) > 5 else ''}; allowed: the same names and shapes, so build both "
            "from one configuration"
        )


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: list(getattr(value, "ds_shape", value.shape)) for name, value in named}


def split_averages(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the whole state of an objective into weights of the model and averages of them.

    Args:
        state: By the names that a checkpoint has for them.

    Returns:
        Both by the model's own names. The first has its parameters and buffers; the second those of them of which
        there are averages, none where the objective keeps none. What the objective holds beside them is in neither.
    """
    weights = _below(state, f"{MODEL}.")
    averages = {name.replace("|", "."): value for name, value in _below(state, f"{AVERAGE}.").items()}
    return weights, {name: value for name, value in averages.items() if name in weights}


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _held(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter or buffer: all, or under stage 3 its shard without padding, flat."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach()
    _, count = share_of(
        parameter.ds_numel,  # type: ignore[attr-defined]
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
    )
    values: Tensor = shard.detach().view(-1)[:count]
    return values


def _chunks(averages: list[Tensor], weights: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Cut both lists into stretches of about CHUNK values, but whole tensors."""
    limit = CPU_CHUNK if averages and averages[0].device.type == "cpu" else CHUNK
    first = size = 0
    for number, average in enumerate(averages):
        size += average.numel()
        if size >= limit or number == len(averages) - 1:
            yield averages[first : number + 1], weights[first : number + 1]
            first, size = number + 1, 0


def _as_float32(weights: list[Tensor]) -> list[Tensor]:
    if all(weight.dtype == torch.float32 for weight in weights):
        return weights
    converted = [torch.empty_like(weight, dtype=torch.float32) for weight in weights]
    torch._foreach_copy_(converted, weights)
    return converted
