"""Comparison of tested runs: launch/finetune.py --compare RUN RUN ..."""

from dataclasses import dataclass
from pathlib import Path

from finetune.classification.predictions import INFO
from finetune.classification.task import ClassificationTask
from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.errors import DataError
from pretrain.objectives.base import Method, method_of
from pretrain.runtime.metrics import read_records
from pretrain.runtime.run_folder import RunFolder
from pretrain.runtime.untrusted import parse_json

SCORES = "scores.json"


@dataclass(frozen=True)
class Tested:
    """Result of a run.

    Attributes:
        name: the run's folder.
        recipe: the run.
        scores: of its newest test, by metric.
        classes: number of classes.
        trained: parameters that were trained.
        memory_gib: most memory that its training process held; None where nothing was recorded.
    """

    name: str
    recipe: TuneRecipe
    scores: dict[str, float]
    classes: int
    trained: int
    memory_gib: float | None

    @property
    def start(self) -> str:
        """Kind of the weights before training."""
        return "pre-trained" if self.recipe.run.init_weights else "scratch"


def read_tested(run: Path) -> Tested:
    """Read a run whose test is done.

    Raises:
        DataError: no test there, or not a fine-tuning run.
    """
    if not (run / "recipe.yaml").is_file():
        raise DataError(f"{run}: no recipe.yaml, so it is no run folder, and was not tested")
    method = method_of(load_tune_recipe(str(run / "recipe.yaml")))
    recipe = method.recipe
    if not isinstance(method, ClassificationTask):
        raise DataError(
            f"{run}: objective {recipe.objective.name}; --compare is for classification and tasks that inherit from it"
        )
    found = sorted(run.glob(f"predictions/*/{SCORES}"))
    if not found:
        raise DataError(f"{run}: no predictions/*/{SCORES}, so it was not tested; launch/finetune.py --test last does")
    # The last by name is of the latest step: its number has leading zeros.
    info = parse_json((found[-1].parent / INFO).read_text(encoding="utf-8"))
    return Tested(
        name=str(run),
        recipe=recipe,
        scores=parse_json(found[-1].read_text(encoding="utf-8")),
        classes=len(info["classes"]),
        trained=trained_parameters(method),
        memory_gib=_peak_memory(RunFolder(run).metrics),
    )


def trained_parameters(method: Method) -> int:
    """Count the parameters that the method trains."""
    return sum(value.numel() for value in method.build().parameters() if value.requires_grad)


def compare(runs: list[Path]) -> list[str]:
    """Tabulate each run's start, method, size and accuracy, and what guessing reaches.

    Raises:
        DataError: one of them has no test.
    """
    tested = [read_tested(run) for run in runs]
    width = max(len(one.name) for one in tested)
    lines = [f"{'run':{width}}  {'start':11}  {'method':11}  {'trained':>11}  {'top-1':>7}  {'top-5':>7}"]
    for one in tested:
        # A test of fewer than five classes has no top-5.
        shown = [f"{one.scores[name]:5.1f} %" if name in one.scores else f"{'-':>7}" for name in ("top1", "top5")]
        lines.append(
            f"{one.name:{width}}  {one.start:11}  {one.recipe.tune.method:11}  {one.trained:11,}  {'  '.join(shown)}"
        )
    for count in sorted({one.classes for one in tested}):
        guess = f"guessing one of {count} classes"
        top5 = f"{500 / count:5.1f} %" if count >= 5 else f"{'-':>7}"
        lines.append(f"{guess:{width + 39}}  {100 / count:5.1f} %  {top5}")
    return lines


def _peak_memory(metrics: Path) -> float | None:
    peaks = [record["memory/peak_gib"] for record in read_records(metrics) if "memory/peak_gib" in record]
    return max(peaks, default=None)
