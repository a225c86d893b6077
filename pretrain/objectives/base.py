"""Contract of a self-supervised method, or a fine-tuning task, with the engine.

A method is one file pretrain/objectives/<name>.py, a task one finetune/<name>/task.py, with `Config`, a dataclass of
the recipe's `objective:` section, its first field `name`, and `METHOD`, its subclass of `Method`. It is looked up once,
when a recipe has been loaded (`method_of`), and handed on. Nothing in it knows of DeepSpeed or of how ranks talk.
"""

import abc
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from pretrain.checkpoint.rank_state import RankState
from pretrain.data.samples import Batch, Samples
from pretrain.errors import RecipeError
from pretrain.models.base import Architecture, Cost, architecture_of
from pretrain.models.formats import export_safetensors
from pretrain.models.frozen import Frozen
from pretrain.models.weights import load_weights
from pretrain.recipe.check import check_recipe, oversized_model, recipe_warnings, unusable_numbers
from pretrain.recipe.components import load_component
from pretrain.recipe.schema import Recipe
from pretrain.runtime.gradient_cache import Embeddings, GradientCache
from pretrain.runtime.process_group import Ranks

#: Tensors that never decay although they have two or more dimensions (VideoMAEv2, optim_factory.get_parameter_groups).
NO_DECAY_NAMES = frozenset({"pos_embed", "cls_token", "mask_token"})
#: Use of exported weights, where the method says no more.
USAGE = "`run.init_weights=FOLDER` of another run."
#: The turn of an objective whose parameters are all updated at once.
ALL = "all"


class Output(NamedTuple):
    """Result of one forward pass: `loss` is a scalar with gradient, `metrics` are detached scalars by name.

    A named tuple, because DeepSpeed looks for tensors in tuples, lists and dictionaries only: it would not hook the
    loss of a dataclass, and its bf16 optimiser then adds up accumulated gradients twice.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """Training of a parameter: rate, decay, turn.

    Attributes:
        lr_scale: factor on the learning rate.
        decays: whether weight decay applies.
        turn: in which of the objective's turns it is updated.
    """

    lr_scale: float = 1.0
    decays: bool = True
    turn: str = ALL


class Objective(nn.Module):
    """A loss around a model, its attribute `model`: given a batch, a scalar and named metrics.

    Attributes:
        turns: updates of one batch, in this order, each of parameters of its own; adversarial training has two.
        whole_batch: the loss looks across the global batch (contrast), so accumulating it over micro-batches would
            silently make it another loss.
        cross_rank_batch_norm: batch norms take their statistics of all ranks' rows, so that another number of ranks
            is the same training (`models/cross_rank_batch_norm.py`).
        COMPILED: names of its functions that `compute.compile` compiles beside the model's blocks: of tensors, with
            neither parameters nor collectives in them.
    """

    COMPILED: ClassVar[tuple[str, ...]] = ()
    turns: ClassVar[tuple[str, ...]] = (ALL,)
    whole_batch: ClassVar[bool] = False
    cross_rank_batch_norm: bool = False
    model: Any
    #: The turn that the coming forward pass is for; the engine sets it where there are several.
    turn: str = ALL

    def forward(self, batch: Batch) -> Output:
        """Compute the loss of a micro-batch that lies on the model's device."""
        raise NotImplementedError

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        """Say how the parameter `name` (as in `named_parameters`) of this shape is trained."""
        return Rule(decays=decays(name, shape))

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Start from the weights `raw`, read from `path` (the recipe's run.init_weights), names as they are there."""
        load_weights(self.model, path, raw=raw)

    def before_step(self, step: int, steps_per_epoch: int, total: int) -> None:
        """Prepare optimiser step `step`, counted from 0 over the whole run, for what follows a schedule.

        It must depend on these numbers alone: a resumed run is told no others. A momentum that rises to 1, for example,
        is `half_cosine(0.99, 1, step / total)` (`recipe/rates.py`).

        Args:
            step: that comes.
            steps_per_epoch: of one pass over the data.
            total: steps of the whole schedule, also where this run ends before (schedule.max_steps).
        """

    def after_step(self) -> None:
        """Follow a step whose update was applied."""

    def keep_evaluated_weights(self) -> None:
        """Make the weights that are evaluated the only ones: averages, where the objective has some."""

    def rank_state(self) -> dict[str, RankState]:
        """Give what is saved beside the weights, queues and banks: restored in place when a run goes on."""
        return {}

    def frozen_parts(self) -> Mapping[str, Frozen[Any]]:
        """Give towers that don't train: plans count them, and a resume compares their hashes in the checkpoint."""
        return {}

    def features(self, batch: Batch) -> Tensor:
        """Give one feature a row, float32 [B, C]; what the recipe's health block judges.

        A method that overrides it computes it without drawing random numbers, from what `Samples.without_chance` makes.
        """
        raise NotImplementedError

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Draw videos to look at, uint8 [B, T, H, W, 3] by name in display order (original, masked, reconstructed).

        Empty where there is nothing to look at.
        """
        return {}


class WholeBatchObjective(Objective):
    """A loss across the global batch: rows are embedded apart, and compared together.

    Where a step has several micro-batches, the engine hands over a cache, through which loss and gradients are exactly
    those of one large batch. `compare` runs twice then, so it must change no state.
    """

    whole_batch = True
    cache: GradientCache | None = None

    def embed(self, batch: Batch) -> Embeddings:
        """Embed the rows of a micro-batch: tensors [B, ...] by name."""
        raise NotImplementedError

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and detached metrics of all rows that this rank has in a step."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Output:
        embeddings = self.embed(batch)
        # An evaluation looks at a batch as it is: the cache knows steps of so many micro-batches, and nothing else.
        if self.cache is None or not self.training:
            return Output(*self.compare(embeddings))
        return Output(*self.cache(embeddings, self.compare))


class Evaluation(Protocol):
    """A measure on held-out data, taken every few epochs while training."""

    #: Epochs between two evaluations; fractions find a best step within an epoch.
    every_epochs: float
    #: Metric whose largest value makes a step the best one.
    best_by: str

    def __call__(self, objective: Any) -> dict[str, float]:
        """Give metrics by name, equal on all ranks. All ranks call it at the same step."""
        ...


@dataclass(frozen=True)
class Export:
    """A format that weights can be written in.

    Attributes:
        write: writes a trained objective to a place, any fsspec URL; returns a remark for the user, or nothing.
        usage: how to use what was written, Markdown for the model card; empty: a single file without a card.
        suffix: what the place must end in, where it is a file of one kind.
        library: that loads it, as hubs call it.
        hub_task: what it is for, as hubs call it.
    """

    write: Callable[[Any, str], str]
    usage: str = ""
    suffix: str = ""
    library: str = "tubelet"
    hub_task: str = "feature-extraction"


class Method(abc.ABC):
    """A way of training, built from a recipe: its data, its objective, and what it adds to the commands.

    Attributes:
        INPUT: kind of sample that it takes where the recipe names none: pretrain/samples/<name>.py.
        MODEL: kind of model that it needs (pretrain/models/base.py).
        SECTIONS: those of the recipe's `OPTIONAL` sections that it reads; values in others are refused.
        recipe: the resolved recipe.
    """

    INPUT: ClassVar[str] = "clip"
    MODEL: ClassVar[type[Any]] = Architecture
    SECTIONS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @functools.cached_property
    def architecture(self) -> Any:
        """The recipe's model, one of `MODEL`.

        Raises:
            RecipeError: it is of another kind.
        """
        return architecture_of(self.recipe, self.MODEL)

    def problems(self) -> list[str]:
        """Say what in the recipe it can't work with; a RecipeError that is raised counts as what it says."""
        found: list[str] = self.architecture.problems()
        return found

    def warnings(self) -> list[str]:
        """Name options that have no effect in the recipe, or that are likely not meant."""
        return []

    @abc.abstractmethod
    def samples(self) -> Samples:
        """Give what data workers make of a sample."""

    @abc.abstractmethod
    def build(self) -> Objective:
        """Make the objective with its first weights."""

    @abc.abstractmethod
    def cost(self) -> Cost:
        """Count the work of one row's forward pass."""

    def data_report(self) -> list[str]:
        """Hold the data that are there against the recipe, as the start of a run does; give what is worth knowing.

        Raises:
            TubeletError: no run would start with them.
        """
        self.samples()
        return []

    def example(self, count: int) -> Batch:
        """Make a micro-batch of `count` samples with made-up content; no data are needed."""
        return self.samples().example(count)

    def evaluation(self, ranks: Ranks) -> Evaluation | None:
        """Open what is measured while training; None where nothing is."""
        return None

    def test(self, ranks: Ranks, which: str | None = None) -> dict[str, float] | None:
        """Test a checkpoint of the run, on all ranks; None where there is nothing to test.

        Args:
            ranks: this process among all.
            which: last, best, or a checkpoint's folder; None: what the recipe says for the end of the training.
        """
        return None

    def predictor(self, objective: Objective, source: Path) -> Any:
        """Give what launch/predict.py asks about one video, a finetune.prediction.VideoPredictor.

        Args:
            objective: trained, in evaluation mode.
            source: checkpoint or export that it was read from.

        Returns:
            None where the method has no such answer.
        """
        return None

    def take_export(self, objective: Objective, source: Path) -> None:
        """Load weights that `exports()` has written as safetensors."""
        load_weights(objective.model, str(source))

    def exports(self, source: Path) -> dict[str, Export]:
        """Name the formats that weights of this method can be written in; `source` is where they come from.

        Safetensors needs nothing of a model but its parameters; override to add formats, or to say how to use weights.
        """
        return {"safetensors": Export(self._write_safetensors, USAGE)}

    def describe(self, source: Path) -> dict[str, bytes]:
        """Give files that go beside exported weights, class names for example, by name."""
        return {}

    def _write_safetensors(self, objective: Any, dest: str) -> str:
        export_safetensors(objective.model, self.recipe, dest)
        return ""


def method_of(recipe: Recipe) -> Method:
    """Look up the method that a recipe names; once, then it is handed on.

    Raises:
        RecipeError: there is none of that name, or it asks for a model of a kind that there is not.
    """
    name = recipe.objective.name
    chosen: type[Method] = load_component("objective", name, type(recipe).METHODS).METHOD
    if not (isinstance(chosen.MODEL, type) and issubclass(chosen.MODEL, Architecture)):
        raise RecipeError(
            f"objective {name!r}: {chosen.__name__}.MODEL is {chosen.MODEL!r}, allowed: a kind of model, one of the "
            "classes in pretrain/models/base.py"
        )
    return chosen(recipe)


def problems_of(method: Method, ranks: int | None = None) -> list[str]:
    """Say everything in a well-typed recipe that can't work.

    Args:
        method: of the recipe.
        ranks: processes of the run; None: as many as were launched, if any.
    """
    recipe = method.recipe
    # Alone, both: what is built or computed to find other problems would not come back from such numbers.
    if unusable := unusable_numbers(recipe) or oversized_model(recipe):
        return unusable
    wrong_input = recipe.input.problems()
    problems = check_recipe(recipe, ranks) + _unread_sections(method) + wrong_input
    for name, source in recipe.data.sources.items():
        problems += recipe.input.source_problems(name, source)
    if wrong_input:
        # Zero frames can't be cut into cubes: what a model would say of a size that is wrong in itself misleads.
        return problems
    try:
        return problems + method.problems()
    except RecipeError as error:
        return problems + error.problems


def _unread_sections(method: Method) -> list[str]:
    """List sections with values that the method would pass over without a word."""
    recipe = method.recipe
    sections = {name: vars(recipe)[name] for name in recipe.OPTIONAL if name not in method.SECTIONS}
    return [
        f"{name}: objective.name={recipe.objective.name} does not read this section, so its values have no effect; "
        f"remove it, or name it in {type(method).__name__}.SECTIONS where the method reads it"
        for name, section in sections.items()
        if section != type(section)()
    ]


def warnings_of(method: Method) -> list[str]:
    """Say everything in a recipe that has no effect or is likely not meant."""
    return recipe_warnings(method.recipe) + method.warnings()


def plain_name(name: str) -> str:
    """Strip from a parameter's name the pieces that torch.compile puts into it.

    The official code compares compiled names, so its mask_token silently decays
    (VideoMAEv2, optim_factory.get_parameter_groups).
    """
    return name.replace("_orig_mod.", "")


def decays(name: str, shape: Iterable[int]) -> bool:
    """Say whether weight decay applies: tensors of two or more dimensions, but not biases, scales and tokens."""
    plain = plain_name(name)
    # By name too: cosine attention's scale [h, 1, 1] has three axes, and officially doesn't decay.
    if plain.rpartition(".")[2] in NO_DECAY_NAMES or plain.endswith((".bias", ".scale")):
        return False
    return len(tuple(shape)) > 1
