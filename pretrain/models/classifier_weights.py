"""Import of weights into the classifier: pre-trained encoders and fine-tuned models, any known layout.

Key names are first brought to the official fine-tuned layout (systems/videomae.md section 11); the strict loader of
pretrain/models/weights.py does the rest. What is dropped on purpose stands in the report as unexpected.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.errors import WeightsError
from pretrain.models import huggingface, weight_files, weights
from pretrain.models.classifier import VideoClassifier
from pretrain.models.official_names import OfficialNames, Renamed
from pretrain.models.weights import LoadReport
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

#: What wrappers and pre-training put in front of the classifier's names (official `run_class_finetuning.py`).
PREFIXES = ("backbone.", "encoder.")
#: Of pre-training only.
IGNORED = ("decoder.*", "encoder_to_decoder.*", "mask_token", "norm.*")
#: AdaptFormer names -> official ones, inside a block.
ADAPTFORMER_PARTS = {"fc1.": "mlp.fc1.", "fc2.": "mlp.fc2."}
#: A linear head, and one behind a batch norm.
HEADS = ("head.", "head.1.")


def load_pretrained(
    model: VideoClassifier,
    path: str,
    encoder_norm: Literal["discard", "fc_norm"] = "discard",
    head: Literal["match", "new"] = "match",
    label_map: Sequence[int] | None = None,
    raw: Mapping[str, Tensor] | None = None,
    fresh_norm: bool = False,
) -> LoadReport:
    """Start a classifier from a checkpoint, with a report.

    Args:
        model: the classifier, without adapters.
        path: file or folder, any fsspec URL.
        encoder_norm: fate of a pre-trained encoder's last norm, which a mean-pooled classifier has no place for:
            officially it is discarded and `fc_norm` starts at 1 and 0; `fc_norm` copies it there instead.
        head: `match` takes the file's head where its shape fits, `new` never.
        label_map: file's class of each of the model's classes (`read_label_map`): the head is cut out by it.
        raw: the weights, where the caller has read them; `path` then only names them.
        fresh_norm: a model with a norm of all tokens (`norm`) may start from a mean-pooled classifier, whose `fc_norm`
            is another one: it is left out, and `norm` keeps its first values (VideoMAE's action detector).

    Raises:
        WeightsError: the backbone is incomplete, has another shape, or a config.json contradicts the model.
    """
    raw = weight_files.read_raw(path) if raw is None else raw
    report = LoadReport(str(path), weights.layout_of(raw))
    state = weights.official_state(raw)
    named = model.from_official(state) if isinstance(model, OfficialNames) else Renamed(classifier_state(state), "")
    state, report.layout = named.state, named.layout or report.layout
    own = model.state_dict(keep_vars=True)  # by name, since a classifier of another kind need not have such norms
    if encoder_norm == "fc_norm" and "fc_norm.weight" in own and "norm.weight" in state:
        state |= {f"fc_norm.{part}": state.pop(f"norm.{part}") for part in ("weight", "bias")}
    # Before the head is cut or left out, which would make a fine-tuned file look pre-trained.
    pretrained = not any(key.startswith("head.") for key in state)
    if label_map is not None:
        state = map_head(state, label_map)
    state = _fit_head(model, state, head)
    # A fine-tuned file must bring its fc_norm; an encoder has none, and the head is looked at by `_fit_head`.
    allowed = ["head.*", "added_class.*", *named.may_miss] + (["fc_norm.*"] if pretrained else [])
    dropped = named.may_ignore if "norm.weight" in own else ("norm.*", *named.may_ignore)
    if fresh_norm and "norm.weight" in own and "norm.weight" not in state and "fc_norm.weight" in state:
        logger.warning("the checkpoint's fc_norm is left out: it is of pooled features, and norm starts fresh")
        allowed, dropped = [*allowed, "norm.*"], ("fc_norm.*",)
    problems = _config_problems(model, path)
    return weights.load_state(model, state, report, allowed, (*IGNORED[:3], *dropped), problems)


def classifier_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring a state in any layout after `weights.official_state` to the names of the official classifier."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
        name = key.removeprefix(prefix)
        name = f"head.{name.removeprefix('classifier.')}" if name.startswith("classifier.") else name
        if name in named:
            raise WeightsError(f"{key}: a second tensor for {name} in one file; delete one of them")
        named[name] = value
    return fuse_projections(named)


def fuse_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring AdaptFormer's blocks to official names: separate q_proj, k_proj, v_proj, and fc1, fc2 outside of `mlp`."""
    fused: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])_proj\.(weight|bias)", key)
        block = re.fullmatch(r"(blocks\.\d+\.)(fc[12]\.)(.*)", key)
        if found:
            apart.setdefault(f"{found[1]}qkv.{found[3]}", {})[found[2]] = value
        elif block:
            fused[block[1] + ADAPTFORMER_PARTS[block[2]] + block[3]] = value
        else:
            fused[key] = value
    return fused | huggingface.join_projections(apart)


def split_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring an official classifier state to AdaptFormer's names; inverse of `fuse_projections`."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn\.)qkv\.(weight|bias)", key)
        if found:
            rows = zip("qkv", value.chunk(3), strict=True)
            split |= {f"{found[1]}{part}_proj.{found[2]}": row.contiguous() for part, row in rows}
        else:
            split[re.sub(r"^(blocks\.\d+\.)mlp\.(fc[12]\.)", r"\1\2", key)] = value
    return split


def read_label_map(path: str) -> list[int]:
    """Read the checkpoint's class of each class of the target: a JSON list, or one number a line.

    The published label_710to400.json, label_710to600.json and label_710to700.json are such lists.
    """
    text = storage.read_bytes(path).decode()
    try:
        values = parse_json(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
    except ValueError as error:
        raise WeightsError(f"{path}: not a list of class numbers ({error})") from error
    if not values or not all(isinstance(value, int) and value >= 0 for value in values):
        raise WeightsError(f"{path}: class numbers from 0 on are needed")
    # Two classes with the same row would always have equal logits.
    if len(set(values)) < len(values):
        raise WeightsError(f"{path}: {len(values) - len(set(values))} classes occur twice; a label map is one to one")
    return values


def map_head(state: Mapping[str, Tensor], label_map: Sequence[int]) -> dict[str, Tensor]:
    """Cut the head down to rows `label_map`: a K710 head for K400, K600 or K700, without training.

    Raises:
        WeightsError: no head in the state, or it has too few classes.
    """
    name = next((name for name in HEADS if f"{name}weight" in state), None)
    if name is None:
        raise WeightsError("a label map was given, but the checkpoint has no head")
    classes = len(state[f"{name}weight"])
    if max(label_map) >= classes:
        raise WeightsError(f"the label map asks for class {max(label_map)}; the checkpoint's head has {classes}")
    rows = torch.tensor(list(label_map))
    return dict(state) | {f"{name}{part}": state[f"{name}{part}"][rows] for part in ("weight", "bias")}


def _fit_head(model: nn.Module, state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Leave out a head that doesn't fit or isn't wanted (official: dropped on shape mismatch), with a line about it."""
    targets = model.state_dict(keep_vars=True)
    own = {key: weights.full_shape(value) for key, value in targets.items() if key.startswith("head.")}
    theirs = {key: tuple(value.shape) for key, value in state.items() if key.startswith("head.")}
    fits = theirs == own
    if not theirs or (fits and head == "match"):
        return state
    why = "a new one is asked for" if head == "new" else "its shape differs; label_map would convert it"
    logger.warning("the checkpoint's head %s is left out: %s", list(theirs.values()), why)
    return {key: value for key, value in state.items() if key not in theirs}


def _config_problems(model: nn.Module, path: str) -> list[str]:
    """List contradictions between our classifier and a Hugging Face config.json beside the weights."""
    if not isinstance(model, VideoClassifier):
        return []  # of another model it says nothing
    content = weight_files.beside(str(path), "config.json")
    shape = model.shape
    expected = {
        "patch_size": shape.patch_size,
        "tubelet_size": shape.tubelet,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.hidden,
    }
    eps = content.get("layer_norm_eps", model.config.norm_eps)
    if eps != model.config.norm_eps:
        logger.warning(
            "%s: its config.json has layer norm epsilon %g, this model %g: outputs differ by about 1e-5. Set "
            "model.norm_eps (and model.fc_norm_eps=1e-5) for equal ones.",
            path, eps, model.config.norm_eps,
        )  # fmt: skip
    return [
        f"config.json says {key}={content[key]}, the model has {value}"
        for key, value in expected.items()
        if content.get(key, value) != value
    ]
