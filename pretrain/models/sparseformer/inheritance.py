"""Blocks of a pre-trained ViT as the last units of a SparseFormer (systems/sparseformer_bootstrap.md, section 4).

Teachers' names come in two forms: timm's (AugReg, DeiT, DINOv2, timm's CLIP), and those of CLIP's image tower here, to
which `clip_weights` brings OpenAI's, open_clip's and Hugging Face's. Inside of a block both call everything as our
units do, so a table of few lines is all there is. What is in no line of it is refused, and not left out without a word.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models import clip_weights
from pretrain.models.sparseformer import sparseformer_config as sizes
from pretrain.models.sparseformer.sparseformer_config import Config
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.weights import LoadReport, load_state, strip_wrappers

logger = logging.getLogger(__name__)

#: What a block and a unit have in common, under the same names.
PARTS = ("norm1.", "attn.qkv.", "attn.proj.", "norm2.", "mlp.fc1.", "mlp.fc2.")
#: The same behind the blocks.
BEHIND = ("norm.", "head.")
#: What makes a teacher's tokens, in place of which the student looks at samples.
DROPPED = (
    *("patch_embed.", "pos_embed", "cls_token", "reg_token", "register_tokens", "mask_token"),  # timm, DINOv2
    *("norm_pre.", "embed."),  # CLIP
)
#: Learned factors on the branches of a block, which the layers in front of them can take up.
SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
#: What a unit has no place for: names, and why.
REFUSED = (
    (r"attn\.[qk]_norm\.", "queries and keys are normalised there (qk-norm), in a SparseFormer's units they are not"),
    (r"attn\.(q|k|v)_(bias|proj\.)", "queries, keys and values are apart there; join them to attn.qkv first"),
    (r"mlp\.(fc1_[gx]|w\d|norm)", "a gated MLP, which a SparseFormer's units don't have"),
    (r"attn_pool\.", "the teacher pools by attention (SigLIP), and has no class token to learn"),
    (r"fc_norm\.", "the teacher's head is of the mean of its tokens, the student's of a class token"),
    (r"(dist_token|head_dist\.)", "a distilled DeiT has a second class token and head; take the plain one"),
    (r"rope", "positions are rotated in each attention there (EVA, DINOv3), which units don't do"),
)
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Inheritance:
    """Outcome of the table: weights under the student's names.

    Attributes:
        state: block by block, then what stands behind them.
        places: of each block that was taken over, its number in `layers`.
        left: names that make the teacher's tokens, or are of earlier blocks.
        folded: factors that layers have taken up.
    """

    state: dict[str, Tensor]
    places: dict[int, int]
    left: list[str]
    folded: list[str]


def inheriting_places(config: Config) -> list[int]:
    """Tell the places in `layers` of the units that a ViT's blocks become: applied once, attention and MLP."""
    full = sizes.resolve(config)
    units = sizes.layout_of(full)
    places = sizes.layer_places(units)
    return [
        place
        for unit, place in zip(units, places, strict=True)
        if {"attend", "mlp"} <= set(unit.operations) and unit.dim == full.dim and unit.repeats == 1
    ]


def inherit(raw: Mapping[str, Tensor], config: Config) -> Inheritance:
    """Bring a ViT's weights to the names of a SparseFormer: its last blocks, the norm behind them, the head.

    Args:
        raw: in timm's names, or a CLIP in any layout that `clip_weights` knows.
        config: of the student.

    Raises:
        WeightsError: no ViT, one of fewer blocks than the student takes, or with parts that have no place there.
    """
    named = teacher_names(raw)
    depth = 1 + max(int(found[1]) for name in named if (found := BLOCK.fullmatch(name)))
    places = inheriting_places(config)
    if depth < len(places):
        raise WeightsError(
            f"the teacher has {depth} blocks, the student takes over {len(places)}; set model.depth={depth} or less"
        )
    first = depth - len(places)
    kept = {first + number: place for number, place in enumerate(places)}
    state: dict[str, Tensor] = {}
    left: list[str] = []
    for name, value in named.items():
        own = _own_name(name, value, kept, config)
        if own is None:
            left.append(name)
        else:
            state[own] = value
    folded = _fold_scales(named, state, kept)
    return Inheritance(state, kept, [name for name in left if name not in folded], folded)


def load_inherited(model: SparseFormer, path: str, raw: Mapping[str, Tensor]) -> LoadReport:
    """Copy a ViT's last blocks, norm and head into a SparseFormer, strictly; the other parameters stay as they are.

    Args:
        model: materialised; also under ZeRO stage 3.
        path: of the weights, for messages.
        raw: see `inherit`.

    Raises:
        WeightsError: see `inherit`; or shapes that differ, or weights of these parts that are missing.
    """
    found = inherit(raw, model.config)
    inherited = tuple(f"layers.{place}.{part}" for place in found.places.values() for part in PARTS) + BEHIND
    new = [name for name in model.state_dict() if not name.startswith(inherited)]
    # Units that also look keep what they look with.
    report = load_state(model, found.state, LoadReport(path, "teacher"), allow_missing=new)
    logger.info(
        "%s: blocks %d to %d became layers %s; left there: %d tensors; folded: %d",
        path, min(found.places), max(found.places), ", ".join(map(str, found.places.values())), len(found.left),
        len(found.folded),
    )  # fmt: skip
    return report


def teacher_names(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the names of an image tower to those of timm and of `clip.VisualTower`, which agree inside of blocks.

    Raises:
        WeightsError: no ViT that is known here.
    """
    state = strip_wrappers(raw)
    if not any(key.startswith("blocks.") for key in state):
        ours = clip_weights.our_names(state)
        state = {key.removeprefix("visual."): value for key, value in ours.items() if key.startswith("visual.")}
    if not any(BLOCK.fullmatch(key) for key in state):
        raise WeightsError(f"no ViT in timm's names and no CLIP; first keys: {', '.join([*state][:4])}")
    return state


def _own_name(name: str, value: Tensor, kept: Mapping[int, int], config: Config) -> str | None:
    """Give a teacher's weight its name in the student, None where it stays behind."""
    refused = next((why for pattern, why in REFUSED if re.search(pattern, name)), None)
    if refused:
        raise WeightsError(f"{name}: {refused}")
    if name.startswith(DROPPED):
        return None
    block = BLOCK.fullmatch(name)
    if block and (block[2] in SCALES or block[2].startswith(PARTS)):
        place = kept.get(int(block[1]))
        return None if place is None or block[2] in SCALES else f"layers.{place}.{block[2]}"
    if name.startswith(BEHIND):
        return None if _is_left(name, value, config) else name
    raise WeightsError(f"{name}: nothing of a SparseFormer takes this weight, and without it the blocks are others")


def _is_left(name: str, value: Tensor, config: Config) -> bool:
    full = sizes.resolve(config)
    if not full.classes:
        return name.startswith("head.")
    # timm gives CLIP's projection, which has no bias, one of zeros; another one is refused by the strict loader.
    return name == "head.bias" and not full.head_bias and not bool(torch.count_nonzero(value))


def _fold_scales(named: Mapping[str, Tensor], state: dict[str, Tensor], kept: Mapping[int, int]) -> list[str]:
    """Multiply LayerScale's factors, of the blocks that are kept, into the layer in front of each."""
    folded = []
    for name, factor in named.items():
        block = BLOCK.fullmatch(name)
        if not block or block[2] not in SCALES or int(block[1]) not in kept:
            continue
        layer = f"layers.{kept[int(block[1])]}.{SCALES[block[2]]}"
        # In float32: both are often stored in half types, whose product would be rounded once more.
        weight, bias = state[f"{layer}.weight"].float(), state[f"{layer}.bias"].float()
        state[f"{layer}.weight"], state[f"{layer}.bias"] = weight * factor.float()[:, None], bias * factor.float()
        folded.append(name)
    return folded
