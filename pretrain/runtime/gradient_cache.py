"""Gradients of a loss over a whole step's embeddings, while the encoder sees one micro-batch at a time.

GradCache (Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021,
section 3.2). The encoder runs twice: first over all micro-batches without a graph, for the embeddings, of which the
loss and its gradient are computed; then again with a graph, each micro-batch's embeddings times their cached gradient
giving its share of the weights' gradient. The sum is exactly that of one large batch.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.errors import TrainingError
from pretrain.runtime.compiler import uncompiled
from pretrain.runtime.tensors import sum_type

#: Named tensors of one row (or several views) a sample, [B, ...].
Embeddings = dict[str, Tensor]

#: Loss (a scalar) and detached metrics by name, of all rows that this rank has in a step.
Compare = Callable[[Embeddings], tuple[Tensor, dict[str, Tensor]]]

#: Largest difference between the two passes, relative to the largest value; bfloat16 kernels that add up in any order
#: stay below it, another dropout mask does not.
SAME = 0.02

#: Factor on the loss while its gradients are cached. DeepSpeed scales a float16 loss in the second pass only, where a
#: gradient of 1 / (rows of the global batch) would be 0 already.
SCALE = 2.0**12


class GradientCache:
    """Embeddings and gradients of one optimiser step after another.

    A `WholeBatchObjective` hands embeddings and comparison to the cache that it is given, and a step calls it twice for
    each micro-batch, seeded alike before both calls:

        with cache.collecting(engine.module):
            for batch in batches:
                engine.module(batch)
        for batch in batches:
            engine.backward(engine(batch).loss)
            engine.step()

    Each call of the second pass returns the whole step's loss and metrics, so their mean over micro-batches is
    right as well, and a gradient that is right once divided by the number of micro-batches, as DeepSpeed does.
    `compare` may have parameters of its own (a temperature), may gather across ranks, and may draw random numbers, the
    same ones in both passes. It runs twice, so it must change no state. Batch norm takes its statistics of a
    micro-batch, over ranks, but not of the whole step.

    Args:
        micro_batches: How many a rank has in a step.
    """

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self._parts: list[Embeddings] = []
        self._gradients: list[Embeddings] = []
        self._result: tuple[Tensor, dict[str, Tensor]] | None = None
        self._random: dict[torch.device, Tensor] = {}
        self._collects = False
        self._replayed = 0
        self._compared_passes = False

    @contextlib.contextmanager
    def collecting(self, module: nn.Module) -> Iterator[None]:
        """Open the first pass over a step's micro-batches; `module` is what is called in it.

        Raises:
            TrainingError: there were fewer or more micro-batches than `micro_batches`.
        """
        self._parts, self._gradients, self._result, self._replayed = [], [], None, 0
        self._collects = True
        try:
            with torch.no_grad(), _same_statistics(module):
                yield
        finally:
            self._collects = False
        if len(self._parts) != self.micro_batches:
            raise TrainingError(
                f"gradient cache: found {len(self._parts)} micro-batches in the first pass, allowed: "
                f"{self.micro_batches}, those of one optimiser step"
            )

    # Python state and two passes: as part of a compiled graph it would be traced anew at every call.
    @uncompiled
    def __call__(self, embeddings: Embeddings, compare: Compare) -> tuple[Tensor, dict[str, Tensor]]:
        """Give loss and metrics of a micro-batch.

        Args:
            embeddings: Of this micro-batch.
            compare: What gives the loss of all micro-batches' embeddings, rows in the order of micro-batches.

        Returns:
            In the first pass nothing of use before the last micro-batch; then and in the second pass the step's loss
            and metrics.

        Raises:
            TrainingError: the second pass has more micro-batches, or gives other embeddings than the first.
        """
        return self._collect(embeddings, compare) if self._collects else self._replay(embeddings, compare)

    def _collect(self, embeddings: Embeddings, compare: Compare) -> tuple[Tensor, dict[str, Tensor]]:
        # A copy: a view (the first token, say) would keep all activations of its micro-batch in memory.
        self._parts.append({name: value.detach().clone() for name, value in embeddings.items()})
        if len(self._parts) < self.micro_batches:
            return next(iter(embeddings.values())).new_zeros((), dtype=torch.float32), {}
        # Before the comparison draws: other numbers in the second pass would be the gradients of another loss.
        self._random = _random_state(embeddings)
        with torch.enable_grad():
            rows = {name: value.requires_grad_(value.is_floating_point()) for name, value in _joined(self._parts)}
            loss, metrics = compare(rows)
            scaled = loss * SCALE
        leaves = {name: value for name, value in rows.items() if value.requires_grad}
        found = torch.autograd.grad(scaled, list(leaves.values()), allow_unused=True)
        sizes = [len(next(iter(part.values()))) for part in self._parts]
        pairs = zip(leaves, found, strict=True)
        # Wide before the division: 2^-12 of a float16 gradient would round to 0 again.
        by_name = {name: (value.to(sum_type(value)) / SCALE).split(sizes) for name, value in pairs if value is not None}
        self._gradients = [{name: value[part] for name, value in by_name.items()} for part in range(len(sizes))]
        self._result = loss.detach(), {name: value.detach() for name, value in metrics.items()}
        return self._result

    def _replay(self, embeddings: Embeddings, compare: Compare) -> tuple[Tensor, dict[str, Tensor]]:
        if self._result is None or self._replayed == self.micro_batches:
            raise TrainingError("gradient cache: found a micro-batch without its first pass: call `collecting` before")
        part, self._replayed = self._replayed, self._replayed + 1
        if not self._compared_passes:
            self._compare_passes(embeddings, part)
        if part > 0:
            cached = [(embeddings[name], value) for name, value in self._gradients[part].items()]
            shares = [(made.to(sum_type(made)) * value).sum() for made, value in cached if made.requires_grad]
            # An encoder that is frozen altogether still needs a loss that can be differentiated.
            surrogate = torch.stack(shares).sum() if shares else self._result[0].clone().requires_grad_()
        else:
            # The loss itself, once: with it come the gradients of the parameters that `compare` has. In the first
            # micro-batch: ZeRO stage 3 overwrites the last step's gradient then, and later adds to it, so a parameter
            # without gradient in the first one would keep the last step's (DeepSpeed 0.19.8, measured).
            with _drawing_from(self._random):
                surrogate, _ = compare(dict(_joined([embeddings, *self._parts[1:]])))
        loss, metrics = self._result
        # The step's loss for the log, plus a term of value 0 that only carries the gradient; DeepSpeed divides by the
        # number of micro-batches, hence the factor.
        return loss + self.micro_batches * (surrogate - surrogate.detach()), metrics

    def _compare_passes(self, embeddings: Embeddings, part: int) -> None:
        """Compare both passes, in the first step only, because it waits for the device."""
        for name, value in self._parts[part].items():
            first, second = value.float(), embeddings[name].detach().float()
            difference, largest = (second - first).abs().max(), first.abs().max()
            if bool(difference > SAME * largest):
                raise TrainingError(
                    f"gradient cache: the second forward pass of micro-batch {part} gave other values of {name!r} "
                    f"than the first (by up to {float(difference):.3g} of {float(largest):.3g}): gradients would be "
                    "wrong. Seed torch alike before both passes, and change no state in them"
                )
        self._compared_passes = part == self.micro_batches - 1


def _joined(parts: list[Embeddings]) -> Iterator[tuple[str, Tensor]]:
    for name in parts[0]:
        yield name, torch.cat([part[name] for part in parts])


def _random_state(embeddings: Embeddings) -> dict[torch.device, Tensor]:
    """Return the state of torch's generators by device: the CPU's, and that of the embeddings' device."""
    state = {torch.device("cpu"): torch.get_rng_state()}
    for device in {value.device for value in embeddings.values()} - state.keys():
        state[device] = torch.get_device_module(device).get_rng_state(device)
    return state


@contextlib.contextmanager
def _drawing_from(state: dict[torch.device, Tensor]) -> Iterator[None]:
    """Draw the random numbers that follow `state`; afterwards generators go on as if nothing had been drawn."""
    accelerators = [device for device in state if device.type != "cpu"]
    kind = accelerators[0].type if accelerators else "cuda"
    with torch.random.fork_rng(accelerators, device_type=kind):
        torch.set_rng_state(state[torch.device("cpu")])
        for device in accelerators:
            torch.get_device_module(device).set_rng_state(state[device], device)
        yield


@contextlib.contextmanager
def _same_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms: the second pass takes them in, once."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
