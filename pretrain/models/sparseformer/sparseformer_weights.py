"""Released SparseFormer weights in and out: the names of both official codes, and of research checkpoints.

Layouts: `train`, of the ImageNet trainer (files "v1.0.0"); `library`, of the package (files "v2.0.0 converted", and all
bootstrapped models); systems/sparseformer.md, section 7, and sparseformer_bootstrap.md, section 7. Loading is strict:
the official loader is not, and a v1 file that its converter has made keeps a random head without a word.
"""

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models.formats import plain_state
from pretrain.models.sparseformer.inflation import inflated, resampled
from pretrain.models.weights import strip_wrappers
from pretrain.runtime import storage

if TYPE_CHECKING:
    from pretrain.models.sparseformer.sparseformer_model import SparseFormer

Layout = Literal["train", "library"]

#: Names of the train code and of the library, by parts that occur once in a name.
TRAIN_TO_LIBRARY = (
    ("tuo_proj.", "out_proj."),
    ("token_roi.", "initial_roi."),
    ("token_embedding.", "initial_embedding."),
    (".ln_attn.", ".norm1."),
    (".ffn.0.", ".norm2."),
    (".ffn.1.", ".mlp.fc1."),
    (".ffn.3.", ".mlp.fc2."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    ("head.norm.", "norm."),
    ("head.classifier.", "head."),
)
#: Marks of the layouts: a name that only such files have.
TRAIN_MARK, RESEARCH_MARK = "token_roi.weight", "token_roi_cc.weight"
#: What the library calls the head.
LIBRARY_HEAD = "proj."


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring weights in any of the layouts, and our own, to the names of `SparseFormer`.

    Raises:
        WeightsError: two tensors for one name.
    """
    named: dict[str, Tensor] = {}
    state = strip_wrappers(state)
    if RESEARCH_MARK in state:
        state = _of_research(state)
    for key, value in state.items():
        name = key
        if TRAIN_MARK in state:
            name = _renamed(key, TRAIN_TO_LIBRARY)
        elif key.startswith(LIBRARY_HEAD):
            name = f"head.{key.removeprefix(LIBRARY_HEAD)}"
        if name in named:
            raise WeightsError(f"{key}: a second tensor for {name} in one file; delete one of them")
        named[name] = value
    return named


def official_names(state: Mapping[str, Tensor], layout: Layout, video: bool = False) -> dict[str, Tensor]:
    """Bring weights of `SparseFormer` to the names of an official code; inverse of `own_names`.

    Args:
        state: under our names.
        layout: of which code.
        video: the library's video model, whose convolution has an axis of time.

    Raises:
        WeightsError: the train code has no such model.
    """
    if layout == "train":
        if video or "cls_embedding.weight" in state:
            raise WeightsError("the train code has image models of v1 alone; write the library's layout")
        backwards = [(new, old) for old, new in TRAIN_TO_LIBRARY]
        return {_back(key, backwards): value for key, value in state.items()}
    named = {re.sub(r"^head\.", LIBRARY_HEAD, key): value for key, value in state.items()}
    stem = "feat_extractor.conv1.weight"
    return named | ({stem: named[stem][:, :, None]} if video else {})


def layout_of_names(state: Mapping[str, Tensor]) -> str:
    """Name the layout that these names are of, for reports."""
    if TRAIN_MARK in state:
        return "SparseFormer's train code"
    return "SparseFormer's research" if RESEARCH_MARK in state else "SparseFormer's library"


def fitted_weights(
    state: Mapping[str, Tensor], *, video: bool, replicates: int, tokens: int, spread: bool
) -> dict[str, Tensor]:
    """Bring weights in any layout to the names, tokens and axes of a model.

    Args:
        state: as in a file.
        video: the model is one of clips; an image model's weights are inflated.
        replicates, tokens: of the model; other numbers of tokens are laid out anew.
        spread: times of points begin spread over the tube, see `inflation`.
    """
    named = own_names(state)
    regions = named.get("initial_roi.weight")
    if regions is None or regions.ndim != 2:
        return named  # the strict loader names what is missing
    if regions.shape[1] == 4:
        if len(regions) != tokens:
            named = resampled(named, tokens)
        if video:
            named = inflated(named, replicates, spread)
    return named


def export_sparseformer(model: "SparseFormer", dest: str, layout: Layout = "library") -> None:
    """Write a .pth file as an official code reads it.

    Args:
        model: not partitioned.
        dest: file, any fsspec URL.
        layout: of which code.
    """
    buffer = io.BytesIO()
    torch.save({"model": official_names(plain_state(model), layout, model.config.video)}, buffer)
    storage.write_bytes(dest, buffer.getvalue())


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        key = key.replace(old, new, 1)
    return key


def _back(key: str, table: list[tuple[str, str]]) -> str:
    if key.startswith(("norm.", "head.")):
        return f"head.norm.{key[5:]}" if key.startswith("norm.") else f"head.classifier.{key[5:]}"
    for new, old in table:
        if new not in ("norm.", "head.") and new in key:
            return key.replace(new, old, 1)
    return key


def _of_research(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring older research files to the library's names, without loss: centres and sizes become corners."""
    rest = dict(state)
    centre, size = rest.pop(RESEARCH_MARK), rest.pop("token_roi_wh.weight")
    rest.pop("global_roi.weight", None)  # of the class token, which looks nowhere
    after = 1 + max((int(found[1]) for key in rest if (found := re.match(r"layers\.(\d+)\.", key))), default=-1)

    def named(key: str) -> str:
        key = re.sub(r"^blocks\.(\d+)\.", lambda found: f"layers.{after + int(found[1])}.", key)
        return re.sub("^ln_post", "norm", re.sub("^global_embedding", "cls_embedding", key))

    corners = torch.cat((centre - size / 2, centre + size / 2), dim=1)
    return {"initial_roi.weight": corners} | {named(key): value for key, value in rest.items()}
