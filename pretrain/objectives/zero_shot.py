"""Zero-shot classification: classes as the mean embedding of sentences about them, by a CLIP's text tower.

Radford et al. 2021, section 3.1.4: a class is the normalised mean of its sentences' normalised embeddings; logits are
cosines times exp(logit_scale), which changes no rank. OpenAI's 80 sentences and the names of ImageNet's classes are
those that open_clip ships.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import DataError, RecipeError, StorageError
from pretrain.models import clip
from pretrain.models.clip_weights import frozen_clip
from pretrain.models.frozen import Frozen
from pretrain.runtime import storage
from pretrain.samples.text import CLIP, Tokenizer, open_clip_module

#: Lists that open_clip ships, by the name that a recipe gives them.
SHIPPED = {
    "imagenet": "IMAGENET_CLASSNAMES",
    "openai": "OPENAI_IMAGENET_TEMPLATES",
    "simple": "SIMPLE_IMAGENET_TEMPLATES",
}
#: Place of the class in a sentence.
MARK = "{}"
#: Sentences in one forward pass of the text tower.
TEXTS = 256


@dataclass
class Sentences:
    """Classes in words, for a teacher that has read."""

    class_names: str | None = None
    """imagenet, or a file (any URL) with a name a line, in the order of the class numbers; null: no zero-shot"""
    templates: str = "openai"
    """openai: the 80 sentences of its ImageNet results; simple: 7 of them; or a file (any URL) with a sentence a line,
    {} in the place of the class"""
    tokenizer: str = CLIP
    """clip, or a tokenizer.json (any URL); has to be the text tower's"""
    text_weights: str | None = None
    """file or folder (any URL) with the text tower; null: objective.teacher.weights"""


def class_names(where: str) -> list[str]:
    """Read the names of classes.

    Args:
        where: imagenet, or a file with a name a line, any fsspec URL.

    Raises:
        DataError: there is no such file, or a name occurs twice in it.
    """
    names = list(_shipped(where)) if where == "imagenet" else _lines(where, "class_names")
    # open_clip's own list has two pairs of equal names ("missile", "sunglasses"); in a file of one's own it is a slip.
    if where != "imagenet" and (twice := sorted({name for name in names if names.count(name) > 1})):
        raise DataError(
            f"class_names={where}: {', '.join(twice[:5])}: more than once; give each class a name of its own"
        )
    return names


def sentences(where: str, names: Sequence[str]) -> list[list[str]]:
    """Write the sentences of each class.

    Args:
        where: openai, simple, or a file with a sentence a line, any fsspec URL.
        names: of the classes.

    Raises:
        DataError: there is no such file, or a line has no {} in it.
    """
    if where in ("openai", "simple"):
        shipped = _shipped(where)
        return [[make(name) for make in shipped] for name in names]
    templates = _lines(where, "templates")
    if lacking := [line for line in templates if MARK not in line]:
        raise DataError(f"templates={where}: {lacking[0]!r} has no {MARK} in the place of the class")
    return [[template.replace(MARK, name) for template in templates] for name in names]


def text_tower(options: Sentences, weights: str, config: clip.Config, dtype: Literal["bf16", "fp32"]) -> Frozen[Any]:
    """Make the text tower of a run, loaded when it is first asked.

    Args:
        options: section of the recipe.
        weights: of the teacher.
        config: sizes of the CLIP.
        dtype: format of weights and activations.
    """
    own = options.text_weights is not None
    key = "objective.held_out.zero_shot.text_weights" if own else "objective.teacher.weights"
    return frozen_clip(key, options.text_weights or weights, config, clip.TextTower, dtype)


@torch.no_grad()
def class_embeddings(
    tower: nn.Module, tokenizer: Tokenizer, texts: Sequence[Sequence[str]], device: torch.device
) -> Tensor:
    """Embed classes: the normalised mean of their sentences' normalised embeddings, float32 [classes, E].

    Args:
        tower: text tower, ids [B, L] -> embeddings [B, E], on `device`.
        tokenizer: of the tower.
        texts: sentences of each class.
        device: of the tower.
    """
    counts = [len(one) for one in texts]
    flat = [text for one in texts for text in one]
    found = []
    for some in _parts(flat, TEXTS):
        ids = torch.from_numpy(tokenizer.encode(some).ids).to(device)
        found.append(F.normalize(tower(ids).float(), dim=-1))
    means = [rows.mean(0) for rows in torch.cat(found).split(counts)]
    return F.normalize(torch.stack(means), dim=-1)


def tokenizer_for(options: Sentences, config: clip.Config) -> Tokenizer:
    """Make the tokenizer of a text tower.

    Raises:
        RecipeError: its vocabulary is not the tower's.
    """
    full: Any = clip.resolve(config)
    found = Tokenizer(options.tokenizer, full.context, too_long="cut")
    if found.vocabulary > full.vocabulary:
        raise RecipeError(
            f"objective.held_out.zero_shot.tokenizer={options.tokenizer}: {found.vocabulary} ids, the text tower has "
            f"{full.vocabulary} (objective.teacher.clip.vocabulary)"
        )
    return found


def similarities(embeddings: Tensor, classes: Tensor) -> Tensor:
    """Compute cosines float32 [B, classes] of embeddings [B, E] and normalised classes [classes, E]."""
    return F.normalize(embeddings.float(), dim=-1) @ classes.t()


def _parts(values: Sequence[str], size: int) -> Iterator[list[str]]:
    yield from (list(values[start : start + size]) for start in range(0, len(values), size))


def _lines(where: str, key: str) -> list[str]:
    try:
        content = storage.read_bytes(where).decode("utf-8-sig")
    except (StorageError, UnicodeDecodeError) as error:
        raise DataError(
            f"{key}={where}: {error}; allowed: a text file with one a line, or {', '.join(SHIPPED)}"
        ) from error
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{key}={where}: an empty file")
    return lines


def _shipped(name: str) -> Any:
    module = open_clip_module("zero_shot_metadata", f"the list {name!r} ships")
    return getattr(module, SHIPPED[name])
