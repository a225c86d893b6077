"""Export of a classifier as a Hugging Face folder; other formats: pretrain/models/formats.py works for any model."""

import json
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch

from pretrain.errors import WeightsError
from pretrain.models import huggingface
from pretrain.models.classifier import VideoClassifier
from pretrain.models.formats import plain_state
from pretrain.models.positions import sinusoid_table
from pretrain.runtime import storage


def export_huggingface(model: VideoClassifier, dest: str, labels: Sequence[str] = ()) -> None:
    """Write config.json and model.safetensors that transformers >= 5 loads as `VideoMAEForVideoClassification`.

    Logits agree to about 1e-5: transformers fixes the epsilon of fc_norm at 1e-5, ours is 1e-6.

    Args:
        model: the model, not partitioned, low-rank updates merged.
        dest: folder, any fsspec URL.
        labels: names of the classes, in order.

    Raises:
        WeightsError: transformers' VideoMAE can't express this model, or the labels don't fit its classes.
    """
    problems = export_problems(model, labels)
    if problems:
        raise WeightsError(
            "transformers' VideoMAE can't hold this model: " + "; ".join(problems)
            + ". Export the official layout or safetensors instead."
        )  # fmt: skip
    state = {}
    for key, value in plain_state(model).items():
        name = f"classifier.{key.removeprefix('head.')}" if key.startswith("head.") else key
        # `from_official` knows pre-training names, in which the backbone is the encoder.
        state[name if name.startswith(("classifier.", "fc_norm.")) else f"encoder.{name}"] = value.float()
    content = safetensors.torch.save(huggingface.from_official(state), {"format": "pt"})
    storage.write_bytes(storage.join(dest, "config.json"), json.dumps(_config(model, labels), indent=2).encode())
    storage.write_bytes(storage.join(dest, "model.safetensors"), content)


def export_problems(model: VideoClassifier, labels: Sequence[str] = ()) -> list[str]:
    """List what of this model transformers' VideoMAE doesn't know."""
    config, grid = model.config, model.grid
    # transformers rebuilds the table and reads none from the file: a stretched one would silently be another.
    rebuilt = sinusoid_table(grid.tokens, model.dim)
    attached = [
        name for name in model.state_dict() if ".update." in name or ".adaptmlp." in name or "embeddings" in name
    ]
    found = {
        "cosine attention": config.cosine_attention,
        "layer scale": config.layer_scale > 0,
        "a head with batch norm": config.head == "batch_norm",
        "token reorganisation": model.reorganisation is not None,
        f"adapters ({len(attached)} tensors; low-rank updates can be merged)": bool(attached),
        "positions stretched to another grid": not torch.equal(model.positions.table.cpu(), rebuilt),
        f"clips that are not square ({grid.height}x{grid.width} patches)": grid.height != grid.width,
        "an added class token": model.added_class is not None,
        "no head": config.classes == 0,
        f"{len(labels)} labels for {config.classes} classes": len(labels) not in (0, config.classes),
    }
    return [name for name, is_so in found.items() if is_so]


def _config(model: VideoClassifier, labels: Sequence[str]) -> dict[str, Any]:
    shape, grid = model.shape, model.grid
    names = dict(enumerate(labels)) if labels else {index: f"LABEL_{index}" for index in range(model.config.classes)}
    return {
        "architectures": ["VideoMAEForVideoClassification"],
        "model_type": "videomae",
        "dtype": "float32",
        "image_size": grid.height * shape.patch_size,
        "num_frames": grid.time * shape.tubelet,
        "patch_size": shape.patch_size,
        "tubelet_size": shape.tubelet,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
        "layer_norm_eps": model.config.norm_eps,
        "initializer_range": 0.02,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_channels": 3,
        "qv_bias": True,
        # transformers takes the first token behind `layernorm` where this is false, which is our `token0`.
        "use_mean_pooling": model.config.pooling == "mean",
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
    }
