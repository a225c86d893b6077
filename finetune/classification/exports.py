"""Formats that a classifier can be written in for use elsewhere."""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.adapters.adapter_files import save_adapter
from finetune.adapters.attach import attached
from finetune.classification import graphs
from finetune.classification.fine_tuned import NAMES, names_of
from finetune.classification.frame_facts import facts_of
from finetune.classification.labels import Task
from finetune.recipe import TuneRecipe
from pretrain.data.media import MEAN, STD
from pretrain.errors import RecipeError
from pretrain.models.base import Classifier
from pretrain.models.classifier_export import export_huggingface
from pretrain.models.formats import export_official, recipe_text
from pretrain.models.huggingface import processor_configs
from pretrain.objectives.base import Export
from pretrain.runtime import storage

#: What hubs call a task.
HUB_TASKS: dict[Task, str] = {"single": "video-classification", "multi": "video-classification", "regression": "other"}
USAGE = "`python launch/predict.py VIDEO --weights FOLDER`, or `run.init_weights=FOLDER` of another run."
USAGE_HUGGINGFACE = "`transformers.VideoMAEForVideoClassification.from_pretrained(FOLDER)`, or " + USAGE


def export_formats(recipe: TuneRecipe, architecture: Classifier, source: Path, plain: Export) -> dict[str, Export]:
    """Name the formats that a run's classifier can be written in; `source` is its checkpoint or export.

    `plain` is safetensors, as any method writes them.
    """
    task = HUB_TASKS[recipe.objective.task]
    if recipe.input.evaluated_filter is not None:
        task = task.replace("video-", "image-")
    bound = functools.partial
    formats = {"safetensors": replace(plain, usage=USAGE, hub_task=task)}
    if architecture.videomae_layouts or architecture.official_layout:
        formats["official"] = Export(_official)
    if architecture.videomae_layouts:
        written = bound(_huggingface, recipe, source)
        formats["huggingface"] = Export(written, USAGE_HUGGINGFACE, library="transformers", hub_task=task)
    return formats | {
        "onnx": Export(bound(_onnx, recipe, source), suffix=".onnx"),
        "torch_export": Export(bound(_torch_export, recipe, source), suffix=".pt2"),
        "adapter": Export(bound(_adapter, recipe), suffix=".safetensors"),
    }


def class_files(recipe: TuneRecipe, source: Path) -> dict[str, bytes]:
    """Give the class names as the file that goes beside exported weights."""
    return {NAMES: "".join(f"{name}\n" for name in names_of(recipe, source)).encode()}


def _huggingface(recipe: TuneRecipe, source: Path, objective: Any, dest: str) -> str:
    facts = graph_facts(recipe, source)
    export_huggingface(objective.model, dest, facts["classes"])
    for name, content in processor_configs(recipe.input.height, facts["short_side"], MEAN, STD).items():
        storage.write_bytes(storage.join(dest, name), json.dumps(content, indent=2).encode())
    # transformers passes it over; launch/predict.py and run.init_weights read the folder by it.
    storage.write_bytes(storage.join(dest, "recipe.yaml"), recipe_text(recipe).encode())
    return ""


def _official(objective: Any, dest: str) -> str:
    if any(name == "update" for _, name in attached(objective.model)):
        raise RecipeError(
            "the official layout has no place for low-rank updates, and official code would drop them without a word; "
            "add --merge"
        )
    export_official(objective.model, dest)
    return ""


def _onnx(recipe: TuneRecipe, source: Path, objective: Any, dest: str) -> str:
    difference = graphs.write_onnx(_trace(recipe, objective), dest, graph_facts(recipe, source))
    return f"opset {graphs.OPSET}; logits in onnxruntime differ from torch's by at most {difference:.1e}"


def _torch_export(recipe: TuneRecipe, source: Path, objective: Any, dest: str) -> str:
    graphs.write_torch_export(_trace(recipe, objective), dest, graph_facts(recipe, source))
    return "load with torch.export.load(FILE).module()"


def _adapter(recipe: TuneRecipe, objective: Any, dest: str) -> str:
    save_adapter(objective.model, recipe.tune, dest)
    place = "finetune.adapters.adapter_files.load_adapter"
    return f"method {recipe.tune.method}; put it on its backbone with {place}"


def _trace(recipe: TuneRecipe, objective: Any) -> Any:
    return graphs.trace(objective.architecture.for_inference(objective.model), *recipe.input.size)


def graph_facts(recipe: TuneRecipe, source: Path) -> dict[str, Any]:
    """Say what else a program must know to use the graph on a video."""
    # A graph has one way to choose frames: that of the first source.
    clip, first = recipe.input, next(iter(recipe.data.sources.values()))
    return {
        "classes": names_of(recipe, source),
        "task": recipe.objective.task,
        **facts_of(clip.frame_choice(first.sampling, first.stride)),
        "short_side": first.short_side or clip.evaluated_side,
        "geometry": clip.GEOMETRY,
        "picture_filter": clip.evaluated_filter,
        "clip": list(clip.size),
        "average": recipe.evaluate.average,
        "run": recipe.run.name,
        "weights": source.name,
    }
