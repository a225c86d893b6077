"""TVTSv2 weights in and out: the official checkpoints, CLIP files for both towers, our own.

Source: systems/tvtsv2.md, section 7; TencentARC/TVTS @ 290a63e, folder v2.
"""

import io
from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models import weights
from pretrain.models.clip_weights import OPEN_CLIP_PARTS, PROJECTIONS, load_clip
from pretrain.models.formats import plain_state
from pretrain.models.tvtsv2 import TVTSv2
from pretrain.models.weights import LoadReport
from pretrain.runtime import storage

#: Outside of blocks, official prefix -> ours.
STEMS = {
    "video_model.class_embedding": "visual.embed.class_token",
    "video_model.positional_embedding": "visual.embed.positions",
    "video_model.temporal_embedding": "visual.times.table",
    "video_model.conv1.weight": "visual.embed.proj.weight",
    "video_model.ln_pre.": "visual.norm_pre.",
    "video_model.transformer.resblocks.": "visual.blocks.",
    "video_model.ln_post.": "visual.norm.",
    "video_model.proj": "visual.head.weight",
    "text_token_embedding.weight": "text.embed.tokens.weight",
    "text_positional_embedding": "text.embed.positions",
    "text_model.resblocks.": "text.blocks.",
    "text_ln_final.": "text.norm.",
    "text_projection": "text.head.weight",
    "pred_model.": "sorting.",
}
#: Inside a block of each tower; those of the video tower have one joint projection already.
PARTS = {
    "visual.blocks.": {"ln_3.": "norm3."}
    | {part: own for part, own in OPEN_CLIP_PARTS.items() if not part.startswith("attn")},
    "text.blocks.": OPEN_CLIP_PARTS,
}
#: What no CLIP has: begins as it is built.
NEW = ("times.table", "blocks.*.norm3.*", "blocks.*.timeattn.*")


def load_tvtsv2(model: TVTSv2, path: str, raw: Mapping[str, Tensor]) -> list[LoadReport]:
    """Copy weights into a model, strictly, whatever layout they have.

    An official inference model has no sorting head, and a CLIP none of what is new in the video tower: there the model
    keeps its first weights. Everything else has to be there.

    Args:
        model: materialised; also under ZeRO stage 3.
        path: where they come from, for messages and for what lies beside.
        raw: names as they are there.

    Raises:
        WeightsError: incomplete, of other sizes, or a file beside them contradicts the model.
    """
    state = weights.strip_wrappers(raw)
    official, own = is_official(state), "visual.times.table" in state
    if not official and not own:
        # Texts first: of a file with an image tower alone nothing must have been loaded.
        report = load_clip(model.text, path, raw=state)
        return [load_clip(model.visual, path, NEW, raw=state), report]
    if official:
        state = own_names(state)
    missing = () if any(key.startswith("sorting.") for key in state) else ("sorting.*",)
    report = LoadReport(str(path), "official TVTSv2" if official else "own")
    return [weights.load_state(model, state, report, allow_missing=missing)]


def is_official(state: Mapping[str, Tensor]) -> bool:
    """Tell whether weights have the official names."""
    # Not by any of them: text_projection is a name of open_clip's as well.
    return any(key.startswith("video_model.") for key in state)


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring official weights under our names; keys without a counterpart stay and are reported later."""
    found = {}
    for key, value in state.items():
        name = _renamed(key, STEMS)
        for blocks, parts in PARTS.items():
            if name.startswith(blocks):
                index, _, part = name.removeprefix(blocks).partition(".")
                name = f"{blocks}{index}.{_renamed(part, parts)}"
        # Multiplied from the right there; the H/14's square text projection would load unturned.
        found[name] = value.t() if name in PROJECTIONS else value
    return found


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring our weights under the official names.

    Raises:
        WeightsError: a weight that the official model doesn't have, an adapter's for example.
    """
    found = {}
    for key, value in state.items():
        name, stem = key, next((stem for stem, own in STEMS.items() if key.startswith(own)), None)
        if stem is None:
            raise WeightsError(f"{key}: the official TVTSv2 has no such weight")
        name = stem + key.removeprefix(STEMS[stem])
        for blocks, parts in PARTS.items():
            if key.startswith(blocks):
                index, _, part = key.removeprefix(blocks).partition(".")
                name = f"{stem}{index}.{_renamed(part, {own: theirs for theirs, own in parts.items()})}"
        found[name] = value.t().contiguous() if key in PROJECTIONS else value
    return found


def write_official(model: TVTSv2, dest: str, sorting: bool = False) -> None:
    """Write a .pth file as the official code reads it.

    Args:
        model: not partitioned.
        dest: file, any fsspec URL.
        sorting: with the sorting head, as training checkpoints are; the official inference model refuses it.
    """
    state = {key: value for key, value in plain_state(model).items() if sorting or not key.startswith("sorting.")}
    buffer = io.BytesIO()
    torch.save({"state_dict": official_names(state)}, buffer)
    storage.write_bytes(dest, buffer.getvalue())


def _renamed(key: str, prefixes: Mapping[str, str]) -> str:
    found = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
    return key if found is None else prefixes[found] + key.removeprefix(found)
