"""What the objectives of fine-tuning have in common: weights to start from, averages of them, rates by layer."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from finetune.adapters.attach import apply_tuning, detach
from finetune.recipe import TuneRecipe
from pretrain.models.averages import WeightAverage
from pretrain.models.backbone import Backbone
from pretrain.models.base import Classifier, Detector
from pretrain.models.pixels import PixelNormalization
from pretrain.models.weights import full_shape
from pretrain.objectives.base import Objective, Rule, decays


def build_tuned(architecture: Classifier | Detector, recipe: TuneRecipe) -> Any:
    """Build a recipe's model with the parts that its `tune:` section trains."""
    recompute: Any = recipe.compute.activation_checkpointing  # checked to be one of the three
    model: Any = architecture.build(recompute)
    apply_tuning(model, recipe.tune)
    return model


class TunedObjective(Objective):
    """A loss around a model that starts from other weights.

    Args:
        model: of the architecture's kind.
        recipe: the run.
        architecture: of the model; it knows the layers.
        normalization: of pixels; default: ImageNet's.
    """

    def __init__(
        self,
        model: Any,
        recipe: TuneRecipe,
        architecture: Classifier | Detector,
        normalization: PixelNormalization | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.architecture: Any = architecture
        self.cross_rank_batch_norm = bool(architecture.cross_rank_batch_norm)
        self.normalization = PixelNormalization() if normalization is None else normalization
        self.average = self._new_average()

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Open a context in which the model has the weights that are evaluated: averages where there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.applied(self.model)

    def keep_evaluated_weights(self) -> None:
        with self.evaluated_weights():
            # Clones: leaving the context writes the live weights back into the same tensors.
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state)
        self.average = None

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        """Scale the learning rate by layer_decay ^ (last layer - layer), for biases, the head, and by the model's."""
        optim, own, shape = self.recipe.optim, name.removeprefix("model."), tuple(shape)
        layer, last = self.architecture.layer_of(own)
        rate = float(optim.layer_decay ** (last - layer)) * self.architecture.lr_scale(own)
        if own.startswith("head."):
            rate *= optim.head_rate
        if optim.bias_rate != 1 and self._beside_matrix(own):
            rate *= optim.bias_rate
        wanted = optim.decayed == "all" or decays(name, shape)
        return Rule(rate, wanted and self.architecture.decays(own, shape))

    def _beside_matrix(self, name: str) -> bool:
        """Tell whether a parameter is the bias of a layer with a matrix; a norm's is none."""
        layer, _, kind = name.rpartition(".")
        weight = getattr(self.model.get_submodule(layer), "weight", None) if kind == "bias" else None
        return weight is not None and len(full_shape(weight)) > 1

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over weights, ours, official or Hugging Face's, with a report; adapters come after them."""
        detach(self.model)  # adapters are no part of a backbone's file
        self.take_start(path, raw)
        apply_tuning(self.model, self.recipe.tune)
        self.average = self._new_average()  # of what is trained now, from what was loaded

    def take_start(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Copy the weights `raw`, read from `path`, into the model as the recipe's `start:` section says."""
        raise NotImplementedError

    def before_step(self, step: int, steps_per_epoch: int, total: int) -> None:
        if isinstance(self.model, Backbone) and self.model.reorganisation is not None:
            self.model.reorganisation.set_step(step, steps_per_epoch)

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update(self.model)

    def _new_average(self) -> WeightAverage | None:
        ema = self.recipe.ema
        return None if ema.decay is None else WeightAverage(self.model, ema.decay, ema.warmup)
