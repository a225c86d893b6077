"""A bootstrapped student as an image tower for open_clip, from whatever a user points at."""

from pathlib import Path

from pretrain.errors import WeightsError
from pretrain.models.visual_adapter import VisualAdapter
from pretrain.objectives.bootstrap import BootstrapObjective
from pretrain.trained.load_run import load_trained


def visual_tower(path: str | Path, output_tokens: bool = False) -> VisualAdapter:
    """Open a bootstrapped student: `clip.visual = visual_tower("runs/sparseformer_btsp_openai_clip_base")`.

    Args:
        path: run (its newest checkpoint that verifies), checkpoint, or export with recipe.yaml; a run also by its URL.
        output_tokens: see `VisualAdapter`.

    Raises:
        WeightsError: a run of another method.
    """
    trained = load_trained(path)
    objective = trained.objective
    if not isinstance(objective, BootstrapObjective):
        raise WeightsError(f"{trained.source}: objective {trained.recipe.objective.name}, allowed: bootstrap")
    mean, std = (getattr(objective.normalization, name).tolist() for name in ("mean", "std"))
    return VisualAdapter(objective.model, trained.recipe.input.height, mean, std, output_tokens).eval()
