"""Teacher of a distillation: a fine-tuned classifier, frozen, outside of everything that is trained or saved."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from omegaconf import MISSING
from torch import Tensor

from finetune.distillation.logit_cache import LogitCache, views_digest
from finetune.recipe import TuneRecipe
from pretrain.checkpoint.same_run import flat, is_harmless
from pretrain.data.index import load_index
from pretrain.errors import WeightsError
from pretrain.models import classifier
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.frozen import Frozen
from pretrain.models.initial_weights import read_weights
from pretrain.runtime.tensors import weights_digest


@dataclass
class Teacher:
    """Source of the answers that are learnt."""

    weights: str = MISSING
    """fine-tuned classifier with the student's classes: a run, a checkpoint, or a file in any layout, any URL"""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """format of its weights and activations"""
    model: classifier.Config = field(default_factory=classifier.Config)
    """its architecture"""


class FrozenTeacher(Frozen[classifier.VideoClassifier]):
    """Teacher of a run: logits of a micro-batch, from the network or from the cache.

    It is loaded when it is first asked, so tests, exports and dry runs of a distilled model don't need it.

    Args:
        recipe: the run; its objective is that of finetune/distillation/task.py.
    """

    def __init__(self, recipe: TuneRecipe) -> None:
        self._recipe = recipe
        self._options: Teacher = recipe.objective.teacher
        super().__init__(
            "objective.teacher.weights",
            self._options.weights,
            self._make,
            self._load,
            self._options.dtype,
            # With a cache of its logits the teacher need not be there; the cache compares the hash itself.
            noted=recipe.objective.cache is None,
        )
        self._cache: LogitCache | None = None
        self._step = self._micro = 0

    def before_step(self, step: int) -> None:
        """Note that the micro-batches that follow are of optimiser step `step`, counted from 0 over all epochs."""
        self._step, self._micro = step, 0

    @torch.no_grad()
    def logits(self, video: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Give logits float32 [B, classes] of the step's next micro-batch.

        Args:
            video: what the student sees: normalised and mixed clips [B, T, H, W, 3].
            batch: the micro-batch that they were made of.
        """
        if self._recipe.objective.cache is None:
            return self._ask(video)
        if self._cache is None:
            self._cache = self._open_cache(len(video))
        views, micro = views_digest(batch), self._micro
        # Counted here: the engine tells the step alone.
        self._micro += 1
        found = self._cache.read(self._step, micro, views)
        if found is None:
            found = self._cache.write(self._step, micro, views, self._ask(video))
        return found.to(video.device)

    def _ask(self, video: Tensor) -> Tensor:
        logits: Tensor = self(video).float()
        return logits

    def _make(self) -> classifier.VideoClassifier:
        return classifier.VideoClassifier(self._options.model, *self._recipe.input.size)

    def _load(self, model: classifier.VideoClassifier, place: str) -> None:
        report = load_pretrained(model, place, raw=read_weights(place))
        # The loader allows a new head; a teacher with one would teach what was drawn.
        if report.missing:
            raise WeightsError(
                f"no fine-tuned classifier of {self._options.model.classes} classes; "
                f"missing: {', '.join(report.missing)}"
            )

    def _open_cache(self, clips: int) -> LogitCache:
        recipe = self._recipe
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        accumulation = recipe.batch.samples // (recipe.batch.micro * ranks)
        # Records lie by rank and micro-batch.
        identity = self._identity() | {"ranks": ranks}
        folder = Path(recipe.objective.cache).absolute()
        return LogitCache(folder, identity, rank, accumulation, (clips, self._options.model.classes))

    def _identity(self) -> dict[str, Any]:
        """Collect all that the logits depend on."""
        recipe, options = self._recipe, self._options
        sections = {"data": asdict(recipe.data), "input": asdict(recipe.input), "augment": asdict(recipe.augment)}
        return {
            "views": {key: value for key, value in flat(sections).items() if not is_harmless(key)},
            "data": {name: load_index(source.shards).fingerprint for name, source in recipe.data.sources.items()},
            "batch": {"samples": recipe.batch.samples, "micro": recipe.batch.micro},
            "seed": recipe.run.seed,
            # Caches of earlier releases hold logits of clips that were mixed by rank.
            "mixing": "by position",
            # Resolved: size=base, and the same sizes written out, are one teacher.
            "teacher": asdict(classifier.resolve(options.model)),
            "teacher_dtype": options.dtype,
            # By values: the file may be moved or copied between two students.
            "teacher_weights": weights_digest(read_weights(options.weights)),
        }
