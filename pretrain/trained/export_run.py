"""Export of a run's weights for use elsewhere, in a format that its method has."""

from pathlib import Path

from pretrain.checkpoint.folders import run_of, step_of
from pretrain.errors import RecipeError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json
from pretrain.trained.load_run import Trained
from pretrain.trained.model_card import write_card


def export_run(trained: Trained, dest: str, layout: str) -> str:
    """Write a run's model.

    Args:
        trained: the run.
        dest: folder, or a file where the format is one; any fsspec URL.
        layout: one of the method's formats.

    Returns:
        A remark for the user, or nothing.

    Raises:
        RecipeError: there is no such format here, `dest` is no place for it, or layout adapter, where everything was
            trained.
        WeightsError: the format can't express this model.
    """
    method, recipe = trained.method, trained.recipe
    formats = method.exports(trained.source)
    if layout not in formats:
        raise RecipeError(
            f"--format {layout}: found objective {recipe.objective.name} with model {recipe.model.name}, whose weights "
            f"can be written as: {', '.join(formats) or 'nothing'}"
        )
    chosen = formats[layout]
    if not dest.endswith(chosen.suffix):
        raise RecipeError(f"{dest}: --format {layout} writes a file, give one ending in {chosen.suffix}")
    # Before the card: a format that can't express this model refuses, and no folder with a card alone is left behind.
    remark = chosen.write(trained.objective, dest)
    if chosen.usage:
        for name, content in method.describe(trained.source).items():
            storage.write_bytes(storage.join(dest, name), content)
        parameters = sum(parameter.numel() for parameter in trained.objective.model.parameters())
        tests = _test_scores(trained.source)
        write_card(dest, recipe, trained.source, parameters, chosen.usage, chosen.library, chosen.hub_task, tests)
    return remark


def _test_scores(source: Path) -> dict[str, float]:
    """Read the scores of the test of this checkpoint, where its run was tested."""
    root = run_of(source)
    path = root / "predictions" / f"step_{step_of(source):08d}" / "scores.json" if root else None
    if path is None or not path.is_file():
        return {}
    scores: dict[str, float] = parse_json(path.read_text(encoding="utf-8"))
    return scores
