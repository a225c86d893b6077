"""Export of a model's weights for other people's code, and configurations inferred from weights."""

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from pretrain.errors import WeightsError
from pretrain.models import huggingface
from pretrain.models.encoder import PRESET_FIELDS, PRESETS
from pretrain.models.official_names import OfficialNames
from pretrain.models.videomae import Config, VideoMAE
from pretrain.runtime import storage


def export_official(model: nn.Module, dest: str) -> None:
    """Write a .pth file as the official code of the model reads it; that of VideoMAE has the weights under `model`.

    Args:
        model: the model, not partitioned.
        dest: file, any fsspec URL.
    """
    buffer = io.BytesIO()
    # Into memory first: `write_bytes` retries with the whole content and never leaves half a file at the place.
    torch.save(model.official_file() if isinstance(model, OfficialNames) else {"model": plain_state(model)}, buffer)
    storage.write_bytes(dest, buffer.getvalue())


def export_huggingface(model: VideoMAE, dest: str, normalize_targets: bool = True) -> None:
    """Write config.json and model.safetensors that transformers >= 5 loads as `VideoMAEForPreTraining`.

    Predictions agree to about 1e-5: transformers fixes the epsilon of the decoder's last norm at 1e-5, ours is 1e-6.

    Args:
        model: the model, not partitioned.
        dest: folder, any fsspec URL.
        normalize_targets: whether it was trained on normalised pixels.

    Raises:
        WeightsError: cosine attention, layer scale or clips that are not square.
    """
    shape, grid = model.shape, model.grid
    frames, height, width = (
        size * cube
        for size, cube in (
            (grid.time, shape.tubelet),
            (grid.height, shape.patch_size),
            (grid.width, shape.patch_size),
        )
    )
    config = huggingface.huggingface_config(model.config, frames, height, width, normalize_targets)
    state = huggingface.from_official({key: value.float() for key, value in plain_state(model).items()})
    storage.write_bytes(storage.join(dest, "config.json"), json.dumps(config, indent=2).encode())
    storage.write_bytes(storage.join(dest, "model.safetensors"), safetensors.torch.save(state, {"format": "pt"}))


def export_safetensors(model: nn.Module, recipe: Any, dest: str) -> None:
    """Write model.safetensors (official names) and the resolved recipe.yaml.

    Args:
        model: the model, not partitioned.
        recipe: the recipe object that built it, or a mapping.
        dest: folder, any fsspec URL.
    """
    storage.write_bytes(storage.join(dest, "recipe.yaml"), recipe_text(recipe).encode())
    content = safetensors.torch.save(plain_state(model), {"format": "pt"})
    storage.write_bytes(storage.join(dest, "model.safetensors"), content)


def recipe_text(recipe: Any) -> str:
    """Render a recipe object or mapping as YAML that can be loaded again."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(recipe)) if isinstance(recipe, Mapping) else recipe)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Collect the weights on the CPU, contiguous, official names.

    Raises:
        WeightsError: ZeRO stage 3 holds only a part of them here.
    """
    # Partitioned parameters are tensors of no elements: the file would be written, without weights.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise WeightsError("the model is partitioned by ZeRO stage 3: consolidate a checkpoint and export that")
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def infer_config(state: Mapping[str, Tensor], heads: int | None = None, decoder_heads: int | None = None) -> Config:
    """Infer the model section that fits an official pre-training state.

    Args:
        state: weights under official names (`read_state`).
        heads, decoder_heads: attention heads, which weights don't show; null: from the scale of cosine attention, or as
            the published size of the same number of channels has them.

    Raises:
        WeightsError: no pre-training weights, or heads that must be given.
    """
    try:
        dim, _, tubelet, patch, _ = state["encoder.patch_embed.proj.weight"].shape
        decoder_dim = state["encoder_to_decoder.weight"].shape[0]
        hidden = state["encoder.blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"not VideoMAE pre-training weights in the official layout: {error}") from error
    return Config(
        size="custom",
        patch_size=patch,
        tubelet=tubelet,
        dim=dim,
        depth=_depth(state, "encoder"),
        heads=_heads(state, "encoder", dim, heads),
        mlp_ratio=mlp_ratio(dim, hidden),
        decoder_dim=decoder_dim,
        decoder_depth=_depth(state, "decoder"),
        decoder_heads=_heads(state, "decoder", decoder_dim, decoder_heads),
        cosine_attention="encoder.blocks.0.attn.scale" in state,
        # Any value above 0 creates the parameters; what they begin with is overwritten by the state.
        layer_scale=float("encoder.blocks.0.gamma_1" in state),
    )


def _depth(state: Mapping[str, Tensor], part: str) -> int:
    indices = [re.match(rf"{part}\.blocks\.(\d+)\.", key) for key in state]
    return 1 + max((int(found[1]) for found in indices if found), default=-1)


def mlp_ratio(dim: int, hidden: int) -> float:
    """Find a ratio with int(dim * ratio) == hidden, the published one where that fits (the giant's 48/11)."""
    published = {float(values[PRESET_FIELDS.index("mlp_ratio")]) for values in PRESETS.values()}
    fitting = [ratio for ratio in sorted(published) if int(dim * ratio) == hidden]
    # int() of a product that rounding left just below a whole number loses a channel: then the next larger ratio.
    exact = hidden / dim
    return fitting[0] if fitting else exact if int(dim * exact) == hidden else math.nextafter(exact, math.inf)


def _heads(state: Mapping[str, Tensor], part: str, dim: int, given: int | None) -> int:
    if given is not None:
        return given
    scale = state.get(f"{part}.blocks.0.attn.scale")
    if scale is not None:
        return scale.numel()
    keys = ("dim", "heads") if part == "encoder" else ("decoder_dim", "decoder_heads")
    published = {
        int(values[PRESET_FIELDS.index(keys[0])]): int(values[PRESET_FIELDS.index(keys[1])])
        for values in PRESETS.values()
    } | ({640: 8} if part == "decoder" else {})  # the decoder of V1's huge model
    if dim not in published:
        known = ", ".join(str(channels) for channels in published)
        raise WeightsError(
            f"{part} of {dim} channels: weights don't show the heads, and only {known} are known; give them"
        )
    return published[dim]
