"""Writes the weights of a pre-training run, in each format that it has."""

import json
from typing import Any

from pretrain.models.formats import export_huggingface, export_official, export_safetensors
from pretrain.models.huggingface import processor_configs
from pretrain.objectives.videomae import MEAN, STD
from pretrain.runtime import storage
from pretrain.trained.load_run import Trained
from pretrain.trained.model_card import write_card

FORMATS = ("safetensors", "official", "huggingface")

USAGE = """\
Fine-tune: `python launch/finetune.py --recipe RECIPE run.init_weights=FOLDER`; look at reconstructions:
`python launch/reconstruct.py FOLDER SHARDS`."""
USAGE_HUGGINGFACE = "`transformers.VideoMAEForPreTraining.from_pretrained(FOLDER)`"


def write_pretrained(trained: Trained, dest: str, layout: str) -> None:
    """Write the model of a pre-training run.

    Args:
        trained: the run.
        dest: folder, or a .pth file for the official layout; any fsspec URL.
        layout: one of FORMATS.

    Raises:
        WeightsError: the layout can't express this model.
    """
    model: Any = trained.objective.model
    if layout == "official":
        export_official(model, dest)
        return
    if layout == "huggingface":
        export_huggingface(model, dest, trained.recipe.objective.normalize_targets)
        size = trained.recipe.data.height
        for name, content in processor_configs(size, size, MEAN, STD).items():
            storage.write_bytes(storage.join(dest, name), json.dumps(content, indent=2).encode())
    else:
        export_safetensors(model, trained.recipe, dest)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    usage, library = (USAGE_HUGGINGFACE, "transformers") if layout == "huggingface" else (USAGE, "tubelet")
    write_card(dest, trained.recipe, trained.source, parameters, usage, library, "feature-extraction")
