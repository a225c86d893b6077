"""Writes a fine-tuned model for use elsewhere, in each format that it has."""

import json
from collections.abc import Callable
from typing import Any

from finetune.adapters.adapter_files import save_adapter
from finetune.adapters.attach import attached
from finetune.classification import graphs
from finetune.classification.fine_tuned import NAMES, FineTuned
from finetune.classification.labels import Task
from pretrain.checkpoint.folders import step_of
from pretrain.errors import WeightsError
from pretrain.models.classifier_export import export_huggingface
from pretrain.models.formats import export_official, export_safetensors, recipe_text
from pretrain.models.huggingface import processor_configs
from pretrain.objectives.videomae import MEAN, STD
from pretrain.runtime import storage
from pretrain.trained.model_card import run_of, write_card

#: What hubs call a task.
HUB_TASKS: dict[Task, str] = {"single": "video-classification", "multi": "video-classification", "regression": "other"}
USAGE = "`python launch/predict.py VIDEO --weights FOLDER`, or `run.init_weights=FOLDER` of another run."
USAGE_HUGGINGFACE = "`transformers.VideoMAEForVideoClassification.from_pretrained(FOLDER)`, or " + USAGE


def write_fine_tuned(tuned: FineTuned, dest: str, layout: str) -> str:
    """Write the model.

    Args:
        tuned: the model.
        dest: folder for safetensors and huggingface, else a file; any fsspec URL.
        layout: one of FORMATS.

    Returns:
        A remark for the user, or nothing.

    Raises:
        WeightsError: the layout can't express this model.
        RecipeError: layout adapter, where everything was trained.
    """
    return FORMATS[layout](tuned, dest)


def _safetensors(tuned: FineTuned, dest: str) -> str:
    export_safetensors(tuned.model, tuned.recipe, dest)
    _describe(tuned, dest, USAGE, "tubelet")
    return ""


def _huggingface(tuned: FineTuned, dest: str) -> str:
    export_huggingface(tuned.model, dest, tuned.names)
    facts = _facts(tuned)
    for name, content in processor_configs(tuned.recipe.data.height, facts["short_side"], MEAN, STD).items():
        storage.write_bytes(storage.join(dest, name), json.dumps(content, indent=2).encode())
    storage.write_bytes(storage.join(dest, "recipe.yaml"), recipe_text(tuned.recipe).encode())
    _describe(tuned, dest, USAGE_HUGGINGFACE, "transformers")
    return ""


def _official(tuned: FineTuned, dest: str) -> str:
    if any(name == "update" for _, name in attached(tuned.model)):
        raise WeightsError(
            "the official layout has no place for low-rank updates, and official code would drop them without a word; "
            "add --merge"
        )
    export_official(tuned.model, dest)
    return ""


def _onnx(tuned: FineTuned, dest: str) -> str:
    difference = graphs.write_onnx(_trace(tuned), dest, _facts(tuned))
    return f"opset {graphs.OPSET}; logits in onnxruntime differ from torch's by at most {difference:.1e}"


def _torch_export(tuned: FineTuned, dest: str) -> str:
    graphs.write_torch_export(_trace(tuned), dest, _facts(tuned))
    return "load with torch.export.load(FILE).module()"


def _adapter(tuned: FineTuned, dest: str) -> str:
    save_adapter(tuned.model, tuned.recipe.tune, dest)
    return (
        f"method {tuned.recipe.tune.method}; put it on its backbone with finetune.adapters.adapter_files.load_adapter"
    )


#: Writers by the name of the format.
FORMATS: dict[str, Callable[[FineTuned, str], str]] = {
    "safetensors": _safetensors,
    "official": _official,
    "huggingface": _huggingface,
    "onnx": _onnx,
    "torch_export": _torch_export,
    "adapter": _adapter,
}


def _trace(tuned: FineTuned) -> Any:
    data = tuned.recipe.data
    return graphs.trace(tuned.model, data.frames, data.height, data.width)


def _facts(tuned: FineTuned) -> dict[str, Any]:
    """What else a program must know to use the graph on a video."""
    data = tuned.recipe.data
    source = next(iter(data.sources.values()))
    return {
        "classes": tuned.names,
        "task": tuned.recipe.objective.task,
        "sampling": source.sampling,
        "stride": source.stride or data.stride,
        "short_side": source.short_side or data.height,
        "clip": [data.frames, data.height, data.width],
        "average": tuned.recipe.evaluate.average,
        "run": tuned.recipe.run.name,
        "weights": tuned.source.name,
    }


def _describe(tuned: FineTuned, dest: str, usage: str, library: str) -> None:
    """Class names and model card of an exported folder."""
    storage.write_bytes(storage.join(dest, NAMES), "".join(f"{name}\n" for name in tuned.names).encode())
    parameters = sum(parameter.numel() for parameter in tuned.model.parameters())
    task = HUB_TASKS[tuned.recipe.objective.task]
    write_card(dest, tuned.recipe, tuned.source, parameters, usage, library, task, _test_scores(tuned))


def _test_scores(tuned: FineTuned) -> dict[str, float]:
    root = run_of(tuned.source)
    path = root / "predictions" / f"step_{step_of(tuned.source):08d}" / "scores.json" if root else None
    if path is None or not path.is_file():
        return {}
    scores: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return scores
