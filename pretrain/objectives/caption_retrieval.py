"""Retrieval of held-out pictures by their captions and the other way round: a bootstrapped student beside its CLIP.

Text is embedded by the teacher's tower, which both share. Several captions of a picture all belong to it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.data.held_out import HeldOutRows, HeldOutSamples, HeldOutSet, Unreadable
from pretrain.data.index import load_index
from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Place, Samples, joined
from pretrain.errors import DataError, RecipeError
from pretrain.metrics.retrieval import RetrievalScores, cosine_ranks, scores_of_ranks
from pretrain.objectives.zero_shot import class_embeddings, text_tower, tokenizer_for
from pretrain.recipe.schema import Recipe, Source

#: Of R@k.
PLACES = (1, 5, 10)
#: Pictures decoded at a time, ahead of the network.
DECODED_AHEAD = 4


class CaptionedRow(NamedTuple):
    """The one row by which a picture is judged, arrays [1, ...], and its captions."""

    arrays: Arrays
    captions: list[str]


class CaptionedBatch(NamedTuple):
    """Rows of some pictures, and the captions of each."""

    rows: Batch
    captions: list[list[str]]


@dataclass(frozen=True)
class CaptionedRows(HeldOutRows[CaptionedRow, CaptionedBatch]):
    """Pictures as they are judged, with what is said about them; `caption` names the text."""

    held_out: HeldOutSet
    samples: Samples
    caption: str

    def make(self, place: Place, key: str, members: Members) -> CaptionedRow:
        return CaptionedRow(self.samples.without_chance(self.held_out.source, members), members.texts(self.caption))

    def collate(self, made: list[CaptionedRow]) -> CaptionedBatch:
        return CaptionedBatch(joined([row.arrays for row in made]), [row.captions for row in made])


@dataclass(frozen=True)
class CaptionScores:
    """What was found.

    Attributes:
        scores: by (whose pictures, direction): student or teacher, text_to_image or image_to_text.
        pictures, captions: that were compared.
        unreadable: pictures that could not be used.
    """

    scores: dict[tuple[str, str], RetrievalScores]
    pictures: int
    captions: int
    unreadable: list[Unreadable]


@torch.no_grad()
def caption_retrieval(
    objective: Any, recipe: Recipe, samples: Samples, shards: str, caption: str, device: torch.device
) -> CaptionScores:
    """Compare all captions with all pictures of some shards, in both directions; one process alone.

    The rank of a picture is its place among pictures, that of a caption the place of the picture's first one among all
    captions; candidates that are equal share their mean place.

    Args:
        objective: a bootstrapped student of a CLIP, in evaluation mode, on `device`.
        recipe: of its run; objective.held_out says how many pictures a forward pass has, and what reads.
        samples: of the run.
        shards: folder (any fsspec URL) of pictures with captions.
        caption: name of the text; empty: the first one.
        device: where to compute.

    Raises:
        RecipeError: the teacher is no CLIP, and no text tower is named.
        DataError: the shards can't be read, or hold no picture with a caption.
    """
    options, teacher = recipe.objective.held_out, recipe.objective.teacher
    if teacher.kind != "clip":
        raise RecipeError(f"captions: the run's teacher is of kind {teacher.kind}, which has read nothing; a CLIP has")
    found = HeldOutSet("captions", load_index(shards), Source(shards=shards))
    pictures = HeldOutSamples(
        [found], CaptionedRows(found, samples, caption), 0, 1, options.micro, recipe.data.deadline_s,
        readahead=DECODED_AHEAD, threaded=True,
    )  # fmt: skip
    sides: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    captions: list[list[str]] = []
    unreadable: list[Unreadable] = []
    for some in pictures:
        unreadable += some.unreadable
        if some.batch is not None:
            rows = {name: value.to(device) for name, value in some.batch.rows.items()}
            answers = objective.answers(rows)
            sides["student"].append(objective.model.forward_head(answers.features).float().cpu())
            sides["teacher"].append(objective.teacher_head(answers.teacher_features).float().cpu())
            captions += some.batch.captions
    if not captions:
        reason = f" ({unreadable[0]})" if unreadable else ""
        raise DataError(f"{shards}: no picture with a caption{reason}; pack.py --kind image --with caption writes them")
    tower = text_tower(options.zero_shot, teacher.weights, teacher.clip, teacher.dtype).module(device)
    flat = [[text] for texts in captions for text in texts]
    texts = class_embeddings(tower, tokenizer_for(options.zero_shot, teacher.clip), flat, device).cpu()
    owners = torch.arange(len(captions)).repeat_interleave(torch.tensor([len(one) for one in captions]))
    scores = {}
    for who, parts in sides.items():
        for direction, one in both_ways(torch.cat(parts), texts, owners).items():
            scores[who, direction] = one
    return CaptionScores(scores, len(captions), len(flat), unreadable)


def both_ways(pictures: Tensor, texts: Tensor, owners: Tensor) -> dict[str, RetrievalScores]:
    """Score retrieval of pictures [P, E] by texts [T, E] and of texts by pictures.

    Args:
        pictures, texts: embeddings of any length.
        owners: picture of each text, int64 [T].
    """
    own = torch.arange(len(pictures))
    by_text = cosine_ranks(texts, pictures, owners, own, "mean")
    by_picture = cosine_ranks(pictures, texts, own, owners, "mean")
    return {
        "text_to_image": scores_of_ranks(by_text, len(pictures), PLACES),
        "image_to_text": scores_of_ranks(by_picture, len(texts), PLACES),
    }
