"""Key names of Hugging Face's VideoMAE, both ways (systems/videomae.md section 11).

Hugging Face splits `qkv` in three and has had two spellings of the query and value bias: `q_bias`, `v_bias` in hub
files and transformers below 5, `query.bias`, `value.bias` in modules from 5 on. Early releases of 5 read the old
spelling as zeros without an error, so both are read here, and the new one is written, which every 5.x reads right.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models.videomae import Config, Shape, resolve, shape_of

#: Outside of blocks, official prefix -> Hugging Face prefix. The longest prefix that fits counts.
STEMS = {
    "encoder.patch_embed.proj.": "videomae.embeddings.patch_embeddings.projection.",
    "encoder.blocks.": "videomae.encoder.layer.",
    "encoder.norm.": "videomae.layernorm.",
    "decoder.blocks.": "decoder.decoder_layers.",
}
#: Inside a block.
PARTS = {
    "attn.proj.": "attention.output.dense.",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
OLD_BIAS = {"attention.attention.q_bias": "attn.q_bias", "attention.attention.v_bias": "attn.v_bias"}
QKV = ("query", "key", "value")
BLOCK = re.compile(r"^((?:encoder|decoder)\.blocks\.\d+\.)(.*)$")
#: Epsilon of the decoder's last norm in transformers, not configurable there.
DECODER_NORM_EPS = 1e-5


def is_huggingface(keys: Iterable[str]) -> bool:
    """Tell whether these are key names of transformers' VideoMAE."""
    return any(key.startswith(("videomae.", "decoder.decoder_layers.")) for key in keys)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a Hugging Face state to official names; keys without a counterpart stay, so they are reported later."""
    found: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = _official_name(key)
        projection = re.fullmatch(r"(.*\.)attention\.attention\.(query|key|value)\.weight", name)
        if projection:
            projections.setdefault(f"{projection[1]}attn.qkv.weight", {})[projection[2][0]] = value
        # Both spellings of a bias in one file: whichever came last would win.
        elif name in found:
            raise WeightsError(f"{key}: a second spelling of {name} in one file; delete one of them")
        else:
            found[name] = value
    return found | join_projections(projections)


def join_projections(apart: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join queries, keys and values that a file holds apart, by the name of the whole and their own first letters.

    Raises:
        WeightsError: one of the three is missing.
    """
    for name, parts in apart.items():
        absent = [part for part in QKV if part[0] not in parts]
        if absent:
            there = [part for part in QKV if part[0] in parts]
            raise WeightsError(f"{name}: {', '.join(absent)} missing in the file beside {', '.join(there)}")
    # The order of rows that the official reshape(3, heads, d) reads; another one trains without an error.
    return {name: torch.cat([parts[part[0]] for part in QKV]) for name, parts in apart.items()}


def _official_name(key: str) -> str:
    for official, foreign in STEMS.items():
        if key.startswith(foreign):
            key = official + key.removeprefix(foreign)
            break
    block = BLOCK.match(key)
    if not block:
        return key
    for official, foreign in [*PARTS.items(), *((new, old) for old, new in OLD_BIAS.items())]:
        if block[2].startswith(foreign):
            return block[1] + official + block[2].removeprefix(foreign)
    return key


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate an official pre-training state to Hugging Face names; every key must have a counterpart."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        block = BLOCK.match(key)
        if block and block[2] == "attn.qkv.weight":
            for part, rows in zip(QKV, value.chunk(3), strict=True):
                found[f"{_stem(block[1])}attention.attention.{part}.weight"] = rows.contiguous()
        elif block:
            found[_stem(block[1]) + _part(key, block[2])] = value
        else:
            found[_stem(key)] = value
    return found


def _stem(key: str) -> str:
    for official, foreign in STEMS.items():
        if key.startswith(official):
            return foreign + key.removeprefix(official)
    return key


def _part(key: str, name: str) -> str:
    for official, foreign in PARTS.items():
        if name.startswith(official):
            return foreign + name.removeprefix(official)
    raise WeightsError(f"{key}: transformers' VideoMAE has no such parameter")


def huggingface_config(config: Config, frames: int, height: int, width: int, normalize_targets: bool) -> dict[str, Any]:
    """Give the content of config.json for `VideoMAEForPreTraining`.

    Raises:
        WeightsError: transformers' VideoMAE can't express this model.
    """
    full, shape = resolve(config), shape_of(config)
    refused = {"cosine attention": config.cosine_attention, "layer scale": config.layer_scale > 0}
    refused |= {f"clips that are not square ({height}x{width})": height != width}
    if any(refused.values()):
        found = ", ".join(name for name, is_so in refused.items() if is_so)
        raise WeightsError(
            f"transformers' VideoMAE knows no {found}; export the official layout or safetensors instead"
        )
    return {
        "architectures": ["VideoMAEForPreTraining"],
        "model_type": "videomae",
        "dtype": "float32",
        "image_size": height,
        "num_frames": frames,
        "norm_pix_loss": normalize_targets,
        "layer_norm_eps": full.norm_eps,
        "initializer_range": 0.02,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_channels": 3,
        "qv_bias": True,
        "use_mean_pooling": False,
    } | _sizes(shape)


def processor_configs(
    size: int, short_side: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Give the files by which transformers makes input of decoded frames, content by name.

    `preprocessor_config.json` for `AutoImageProcessor` (a list of frames), `video_preprocessor_config.json` for
    `AutoVideoProcessor`. Both resize with antialiasing, which our validation (as the official one) does without: equal
    input where frames have the short side already, else close to it. Neither chooses frames: the sampling is the
    caller's.

    Args:
        size: side of the square clips, pixels.
        short_side: of the frames before the centre is cut, pixels.
        mean, std: of the normalisation, for pixels from 0 to 1.
    """
    common = {
        "do_resize": True,
        "size": {"shortest_edge": short_side},
        "resample": 2,  # PIL's number of bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return {
        "preprocessor_config.json": {"image_processor_type": "VideoMAEImageProcessor"} | common,
        "video_preprocessor_config.json": {"video_processor_type": "VideoMAEVideoProcessor", "do_sample_frames": False}
        | common,
    }


def _sizes(shape: Shape) -> dict[str, int]:
    return {
        "patch_size": shape.patch_size,
        "tubelet_size": shape.tubelet,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": int(shape.dim * shape.mlp_ratio),
        "decoder_hidden_size": shape.decoder_dim,
        "decoder_num_hidden_layers": shape.decoder_depth,
        "decoder_num_attention_heads": shape.decoder_heads,
        "decoder_intermediate_size": int(shape.decoder_dim * shape.mlp_ratio),
    }


def config_problems(content: Mapping[str, Any], shape: Shape) -> list[str]:
    """List where a config.json contradicts the model: a wrong number of heads fits any weights, silently."""
    return [
        f"config.json says {key}={content[key]}, the model has {expected}"
        for key, expected in _sizes(shape).items()
        if content.get(key, expected) != expected
    ]
