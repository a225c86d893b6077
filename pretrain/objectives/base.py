"""What the engine and the data workers ask of a self-supervised method.

A method is one file pretrain/objectives/<name>.py with

- `Config`: a dataclass of its options (the recipe's `objective:` section), its first field `name`;
- `check(recipe) -> list[str]`: what in the recipe it can't work with;
- `view_tensors(recipe) -> ViewTensors`: what a data worker draws for one view, mask indices for example; picklable
  (a functools.partial of a module's function, say), because workers are spawned. Or, in its place,
  `sample_views(recipe) -> pretrain.data.samples.SampleViews`, which makes the views altogether;
- `build(recipe) -> Objective`: the module;
- `cost(recipe) -> dict[str, float]`: multiply-accumulates of one clip's forward pass as publications count them, by
  part; a part named `skipped: ...` belongs to that count but is not executed here;

and, where it has any to give, `warnings(recipe) -> list[str]`: options that have no effect; and
`evaluation(recipe, ranks) -> pretrain.engine.evaluation.Evaluation | None`: what is measured every few epochs.

Nothing in it knows of ranks, DeepSpeed or files.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from pretrain.models.weights import load_weights

#: A micro-batch: `video` uint8 [B, T, H, W, 3], the objective's index tensors [B, ...], and lists such as `key`.
Batch = dict[str, Any]

#: Maps a generator factory (purpose -> generator of this sample and view) to named arrays for one view.
ViewTensors = Callable[[Callable[[str], np.random.Generator]], dict[str, np.ndarray]]


class Output(NamedTuple):
    """Result of one forward pass: `loss` is a scalar with gradient, `metrics` are detached scalars by name.

    A named tuple, because DeepSpeed looks for tensors in tuples, lists and dictionaries only: it would not hook the
    loss of a dataclass, and its bf16 optimiser then adds up accumulated gradients twice.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """A self-supervised method around a model, its attribute `model`."""

    def forward(self, batch: Batch) -> Output:
        """Loss of a micro-batch that lies on the model's device."""
        raise NotImplementedError

    def lr_scale(self, name: str) -> float:
        """Factor on the learning rate of the parameter `name` (as in `named_parameters`)."""
        return 1.0

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Start from the weights `raw`, read from `path` (the recipe's run.init_weights), names as they are there."""
        load_weights(self.model, path, raw=raw)  # type: ignore[arg-type]

    def before_step(self, step: int, steps_per_epoch: int) -> None:
        """Called before optimiser step `step`, counted from 0 over the whole run, for what follows a schedule.

        It must depend on these numbers alone: a resumed run is told no others.
        """

    def after_step(self) -> None:
        """Called after every step whose update was applied."""

    def features(self, video: Tensor) -> Tensor:
        """One feature a clip, float32 [B, C], of clips uint8 [B, T, H, W, 3]; what the recipe's health block judges.

        A method that overrides it computes it without drawing random numbers.
        """
        raise NotImplementedError

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Videos to look at, uint8 [B, T, H, W, 3] by name in display order (original, masked, reconstructed)."""
        raise NotImplementedError
