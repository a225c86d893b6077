"""Import of CLIP weights: OpenAI's archives, open_clip's files and folders, Hugging Face's `CLIPModel`, our own.

Files name neither the number of heads nor the activation, and a wrong one changes every output without an error. Where
a config.json or open_clip_config.json lies beside the weights it must agree with the model; where nothing says which
activation it is, the recipe has to.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models import weight_files, weights
from pretrain.models.clip import CLIP, Config, TextTower, VisualTower, resolve
from pretrain.models.frozen import Frozen
from pretrain.models.huggingface import join_projections
from pretrain.models.weights import LoadReport

Layout = Literal["OpenAI", "open_clip", "Hugging Face", "own"]

#: Numbers that OpenAI's archives hold beside the weights.
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")
#: Outside of blocks, foreign prefix -> ours.
OPEN_CLIP_STEMS = {
    "visual.class_embedding": "visual.embed.class_token",
    "visual.positional_embedding": "visual.embed.positions",
    "visual.conv1.weight": "visual.embed.proj.weight",
    "visual.ln_pre.": "visual.norm_pre.",
    "visual.transformer.resblocks.": "visual.blocks.",
    "visual.ln_post.": "visual.norm.",
    "visual.proj": "visual.head.weight",
    "token_embedding.weight": "text.embed.tokens.weight",
    "positional_embedding": "text.embed.positions",
    "transformer.resblocks.": "text.blocks.",
    "ln_final.": "text.norm.",
    "text_projection": "text.head.weight",
}
HUGGING_FACE_STEMS = {
    "vision_model.embeddings.class_embedding": "visual.embed.class_token",
    "vision_model.embeddings.position_embedding.weight": "visual.embed.positions",
    "vision_model.embeddings.patch_embedding.weight": "visual.embed.proj.weight",
    "vision_model.pre_layrnorm.": "visual.norm_pre.",
    "vision_model.encoder.layers.": "visual.blocks.",
    "vision_model.post_layernorm.": "visual.norm.",
    "visual_projection.": "visual.head.",
    "text_model.embeddings.token_embedding.weight": "text.embed.tokens.weight",
    "text_model.embeddings.position_embedding.weight": "text.embed.positions",
    "text_model.encoder.layers.": "text.blocks.",
    "text_model.final_layer_norm.": "text.norm.",
    "text_projection.": "text.head.",
}
#: Inside a block.
OPEN_CLIP_PARTS = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
HUGGING_FACE_PARTS = {
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "self_attn.out_proj.": "attn.proj.",
    "mlp.fc": "mlp.fc",
}
#: [embedding, C] here and in Hugging Face, [C, embedding] in open_clip.
PROJECTIONS = ("visual.head.weight", "text.head.weight")
BLOCK = re.compile(r"((?:visual|text)\.blocks\.\d+\.)(.*)")
PROJECTION = re.compile(r"(.*\.)self_attn\.([qkv])_proj\.(weight|bias)")
#: Keys of a config.json's sections -> ours, the text tower's with `text_` in front.
HUGGING_FACE_KEYS = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
}
HUGGING_FACE_OTHER = {
    "patch_size": "patch_size",
    "image_size": "image_size",
    "max_position_embeddings": "context",
    "vocab_size": "vocabulary",
    "eos_token_id": "end_id",
}
#: What a config.json leaves out where it has these values (transformers' CLIPVisionConfig, CLIPTextConfig).
HUGGING_FACE_DEFAULTS: dict[str, Any] = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 32,
    "image_size": 224,
}
TEXT_DEFAULTS = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
#: Section -> model type of a file with this tower alone, our prefix, defaults.
HUGGING_FACE_SECTIONS = {
    "vision_config": ("clip_vision_model", "", VISION_DEFAULTS),
    "text_config": ("clip_text_model", "text_", TEXT_DEFAULTS),
}
#: End of text in the config.json files of before July 2023, which transformers takes for "the highest id".
LEGACY_END = 2
#: Options of open_clip that change outputs and leave no trace in key names; these values are what is built here.
OPEN_CLIP_VISION: dict[str, Any] = {"vision_cfg.pool_type": "tok"}
OPEN_CLIP_TEXT: dict[str, Any] = {"text_cfg.pool_type": "argmax", "text_cfg.no_causal_mask": False}


def load_clip(
    model: CLIP | VisualTower | TextTower,
    path: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    raw: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Copy CLIP weights into a model or one of its towers, strictly; the report has our names.

    Args:
        model: materialised; also under ZeRO stage 3. A tower takes its part of a file with both.
        path: file or folder, any fsspec URL.
        allow_missing: glob patterns of keys that may keep their value.
        allow_unexpected: glob patterns of keys in the file that may be ignored.
        raw: the weights, where the caller has read them; `path` then only names them.

    Raises:
        WeightsError: unreadable, incomplete, of other sizes, or a file beside them contradicts the model.
    """
    raw = weights.strip_wrappers(weight_files.read_raw(path) if raw is None else raw)
    layout = layout_of(raw)
    state = our_names(raw)
    problems = config_problems(model, path, layout)
    tower = "visual." if isinstance(model, VisualTower) else "text." if isinstance(model, TextTower) else ""
    if tower:
        other = {"visual.": "text.*", "text.": "visual.*"}[tower]
        state = {key.removeprefix(tower): value for key, value in state.items()}
        # One tower's weights are unprefixed; the other's and the temperature are of the file, not of the model.
        allow_unexpected = (*allow_unexpected, other, "logit_scale", "logit_bias")
    return weights.load_state(model, state, LoadReport(str(path), layout), allow_missing, allow_unexpected, problems)


def frozen_clip(
    key: str,
    weights: str,
    config: Config,
    tower: type[CLIP] | type[VisualTower] | type[TextTower] = CLIP,
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
) -> Frozen[Any]:
    """Build CLIP, or one tower of it, as a frozen part of an objective.

    Args:
        key: of the recipe that names the weights.
        weights: see pretrain/models/frozen.py.
        config: sizes.
        tower: what is built.
        dtype: format of weights and activations.
    """
    return Frozen(key, weights, partial(tower, config), load_clip, dtype)


def layout_of(raw: Mapping[str, Tensor]) -> Layout:
    """Name the layout that these key names are of.

    Raises:
        WeightsError: nobody's that is known.
    """
    if any(key.startswith(("vision_model.", "text_model.")) for key in raw):
        return "Hugging Face"
    if any(key.startswith(("visual.blocks.", "text.blocks.")) for key in raw):
        return "own"
    if any("transformer.resblocks." in key for key in raw):
        return "OpenAI" if all(mark in raw for mark in OPENAI_MARKS) else "open_clip"
    raise WeightsError(
        f"no CLIP with transformer towers in a layout that is known here; its first keys: {', '.join([*raw][:4])}"
    )


def our_names(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring weights in any known layout under our names; keys without a counterpart stay and are reported later."""
    layout = layout_of(raw)
    found = dict(raw) if layout == "own" else _fused(raw) if layout == "Hugging Face" else _from_open_clip(raw)
    if "logit_scale" in found:
        # Others have a parameter without dimensions there; models/clip.py says why ours has one.
        found["logit_scale"] = found["logit_scale"].reshape(1)
    return found


def _from_open_clip(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, value in raw.items():
        if key in OPENAI_MARKS:
            continue
        # open_clip's models with a custom text tower hold the text's part below `text.`.
        name = _named(key.removeprefix("text."), OPEN_CLIP_STEMS, OPEN_CLIP_PARTS)
        # open_clip multiplies from the right; a square projection, as all its text towers have, would load unturned.
        found[name] = value.t() if name in PROJECTIONS else value
    return found


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring weights under our names to open_clip's, which are OpenAI's: what others can read.

    Raises:
        WeightsError: a weight that CLIP doesn't have, an adapter's for example.
    """
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        stem = next((stem for stem, own in OPEN_CLIP_STEMS.items() if key.startswith(own)), None)
        name = key if stem is None else stem + key.removeprefix(OPEN_CLIP_STEMS[stem])
        block = BLOCK.fullmatch(key)
        part = next((part for part, own in OPEN_CLIP_PARTS.items() if block and block[2].startswith(own)), None)
        if block and part is not None:
            index = block[1].split(".")[2]
            name = f"{stem}{index}.{part}{block[2].removeprefix(OPEN_CLIP_PARTS[part])}"
        elif block or (stem is None and key != "logit_scale"):
            raise WeightsError(f"{key}: open_clip's CLIP has no such weight")
        found[name] = value.t().contiguous() if key in PROJECTIONS else value
    if "logit_scale" in found:
        found["logit_scale"] = found["logit_scale"].reshape(())
    return found


def _fused(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring Hugging Face's names to ours, queries, keys and values in one matrix."""
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for key, value in raw.items():
        if key.endswith(".position_ids"):
            continue  # 0, 1, 2, ..., which transformers below 4.31 saved
        name = _named(key, HUGGING_FACE_STEMS, HUGGING_FACE_PARTS)
        part = PROJECTION.fullmatch(name)
        if part:
            apart.setdefault(f"{part[1]}attn.qkv.{part[3]}", {})[part[2]] = value
        else:
            found[name] = value
    return found | join_projections(apart)


def _named(key: str, stems: Mapping[str, str], parts: Mapping[str, str]) -> str:
    stem = next((stem for stem in stems if key.startswith(stem)), None)
    name = key if stem is None else stems[stem] + key.removeprefix(stem)
    block = BLOCK.fullmatch(name)
    if not block:
        return name
    part = next((part for part in parts if block[2].startswith(part)), None)
    return name if part is None else block[1] + parts[part] + block[2].removeprefix(part)


def config_problems(model: CLIP | VisualTower | TextTower, path: str, layout: Layout) -> list[str]:
    """List contradictions of a model with what stands beside the weights; an activation that nobody states is one."""
    towers = [kind for kind in (VisualTower, TextTower) if isinstance(model, (CLIP, kind))]
    wanted = _wanted(model.config, towers)
    stated: list[tuple[str, dict[str, Any]]] = []
    hugging_face = weight_files.beside(path, "config.json")
    open_clip = weight_files.beside(path, "open_clip_config.json")
    if str(hugging_face.get("model_type", "")).startswith("clip"):
        stated.append(("config.json", _hugging_face_facts(hugging_face, model.config)))
    if "model_cfg" in open_clip:
        stated.append(("open_clip_config.json", _open_clip_facts(open_clip["model_cfg"])))
    if layout == "OpenAI":
        stated.append(("OpenAI's layout", {"activation": "quick_gelu", "text_activation": "quick_gelu"}))
    problems = [
        f"{where} says {key}={facts[key]}, the model has {value}"
        for where, facts in stated
        for key, value in wanted.items()
        if key in facts and facts[key] != value
    ]
    said = any(key.endswith("activation") for _, facts in stated for key in facts)
    if model.config.activation is None and layout != "own" and not said:
        problems.append(
            "nothing beside the weights says which activation they were trained with; set activation=quick_gelu "
            "(OpenAI, MetaCLIP, DFN) or activation=gelu (LAION, DataComp)"
        )
    return problems


def _wanted(config: Config, towers: Sequence[type]) -> dict[str, Any]:
    """List what the model has, by recipe key; the text tower's values with `text_` in front."""
    full: Any = resolve(config)
    both = {"activation": full.activation, "norm_eps": full.norm_eps}
    found: dict[str, Any] = {}
    if VisualTower in towers:
        found |= both | {key: getattr(full, key) for key in ("dim", "depth", "heads", "patch_size", "image_size")}
        found |= {"hidden": int(full.dim * full.mlp_ratio)} | OPEN_CLIP_VISION
    if TextTower in towers:
        found |= {f"text_{key}": value for key, value in both.items()}
        found |= {key: getattr(full, key) for key in ("text_dim", "text_depth", "text_heads")}
        found |= {"text_hidden": int(full.text_dim * full.mlp_ratio)} | OPEN_CLIP_TEXT
        found |= {"context": full.context, "vocabulary": full.vocabulary, "end_id": _end(full)}
    return found


def _end(config: Config) -> int:
    return config.vocabulary - 1 if config.end_id is None else config.end_id


def _hugging_face_facts(content: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Read what a config.json says, by recipe key."""
    found: dict[str, Any] = {}
    for section, (alone, prefix, defaults) in HUGGING_FACE_SECTIONS.items():
        said = content if content["model_type"] == alone else content.get(section)
        if said is not None:
            # transformers leaves out values that equal its defaults: without them a B/32 file would contradict nothing.
            facts = HUGGING_FACE_DEFAULTS | defaults | dict(said)
            found |= {prefix + name: facts[key] for key, name in HUGGING_FACE_KEYS.items()}
            found |= {name: facts[key] for key, name in HUGGING_FACE_OTHER.items() if key in defaults}
    if found.get("end_id") == LEGACY_END:
        found["end_id"] = _end(config)
    return found


def _open_clip_facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Read what an open_clip_config.json says, by recipe key."""
    vision, text = content.get("vision_cfg", {}), content.get("text_cfg", {})
    activation = "quick_gelu" if content.get("quick_gelu", False) else "gelu"
    found: dict[str, Any] = {"activation": activation, "text_activation": activation}
    names = {"width": "dim", "layers": "depth", "patch_size": "patch_size", "image_size": "image_size"}
    found |= {name: vision[key] for key, name in names.items() if key in vision}
    if "width" in vision:
        # open_clip states no number of heads for images; 64 is the default of its CLIPVisionCfg.
        found["heads"] = vision["width"] // vision.get("head_width", 64)
    found |= {key: vision[key.split(".")[1]] for key in OPEN_CLIP_VISION if key.split(".")[1] in vision}
    names = {"width": "text_dim", "layers": "text_depth", "heads": "text_heads", "context_length": "context",
             "vocab_size": "vocabulary"}  # fmt: skip
    found |= {name: text[key] for key, name in names.items() if key in text}
    return found | {key: text[key.split(".")[1]] for key in OPEN_CLIP_TEXT if key.split(".")[1] in text}
