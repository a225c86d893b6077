"""Embeddings of texts for TagAlign: the tags of a list, written beside it, and classes that are asked for."""

from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pretrain.data.tags.tag_folder import EMBEDDINGS, HASH, list_hash, read_tags
from pretrain.errors import DataError, RecipeError
from pretrain.models import clip
from pretrain.models.clip_weights import frozen_clip
from pretrain.models.frozen import Frozen
from pretrain.models.tag_embeddings import TEMPLATE, TOWER
from pretrain.objectives.zero_shot import MARK
from pretrain.runtime import storage
from pretrain.samples.text import Tokenizer

#: Sentence about a tag or class (the set `simple` of the official evaluation; for tags unverified).
SIMPLE = "a photo of a {}."
#: Texts in one forward pass of the text tower.
TEXTS = 256


@torch.no_grad()
def text_features(tower: Any, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device | str) -> Tensor:
    """Embed texts, float32 [n, E], not normalised.

    Raises:
        SampleError: a text that can't be encoded, or with more tokens than the context where that is refused.
    """
    found = []
    for start in range(0, len(texts), TEXTS):
        ids = torch.from_numpy(tokenizer.encode(texts[start : start + TEXTS]).ids).to(device)
        found.append(tower(ids).float())
    return torch.cat(found)


def classes_by_templates(
    tower: Any, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str], device: torch.device | str
) -> Tensor:
    """Embed classes as the official evaluation does: the mean over templates of what is not normalised, [K, E].

    A name may hold other words for the same class, separated by ";": each goes into the mean with every template.

    Raises:
        DataError: a template has no {}, or a name is empty.
    """
    if lacking := [one for one in templates if MARK not in one]:
        raise DataError(f"template {lacking[0]!r}: has no {MARK} in the place of the class")
    rows = []
    for name in names:
        words = [word.strip() for word in name.split(";") if word.strip()]
        if not words:
            raise DataError("an empty class name; give each class a word")
        texts = [template.replace(MARK, word) for word in words for template in templates]
        rows.append(text_features(tower, tokenizer, texts, device).mean(0))
    return torch.stack(rows)


def embed_tags(
    folder: str, weights: str, config: clip.Config, tokenizer: str, template: str = SIMPLE, device: str = "cpu"
) -> tuple[int, int]:
    """Embed the tags of a folder by a CLIP's text tower and write them beside the list, with the list's hash.

    Args:
        folder: of tags, any fsspec URL.
        weights: of the CLIP; file, folder or hub:owner/name.
        config: its sizes.
        tokenizer: of the text tower.
        template: sentence about a tag, {} in its place.
        device: to compute on.

    Returns:
        Tags, and how many of them were longer than the context.

    Raises:
        DataError: no list, or a template without {}.
        WeightsError: the tower is missing or of other sizes.
        RecipeError: the tokenizer has more ids than the tower.
    """
    tags, full = read_tags(folder), clip.resolve(config)
    if MARK not in template:
        raise DataError(f"template {template!r}: has no {MARK} in the place of the tag")
    reader = Tokenizer(tokenizer, full.context, too_long="cut")
    if reader.vocabulary > full.vocabulary:
        raise RecipeError(f"tokenizer {tokenizer}: {reader.vocabulary} ids, the text tower has {full.vocabulary}")
    tower: Frozen[Any] = frozen_clip("--clip", weights, config, clip.TextTower, "fp32")
    texts = [template.replace(MARK, tag) for tag in tags]
    table = text_features(tower.module(device), reader, texts, device).cpu()
    if not table.isfinite().all():
        raise DataError(f"{weights}: embeddings of tags are not finite")
    stated = {HASH: list_hash(tags), TEMPLATE: template, TOWER: tower.digest}
    content = safetensors.torch.save({"table": table}, stated)
    storage.write_bytes(storage.join(folder, EMBEDDINGS), content)
    return len(tags), int((reader.encode(texts).cut > 0).sum())
