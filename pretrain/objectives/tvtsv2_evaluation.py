"""Zero-shot measures of TVTSv2 on held-out videos: retrieval, recognition by sentences about classes, sorting.

Source: systems/tvtsv2.md, section 6. Clips are not masked; cosines are compared. Shapes: V videos, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.data.held_out import HeldOut
from pretrain.errors import DataError, StorageError
from pretrain.metrics.ranking import accuracy
from pretrain.metrics.retrieval import Ties, dual_softmax, retrieval_scores
from pretrain.objectives.contrast import normalized
from pretrain.objectives.zero_shot import MARK, class_names, sentences
from pretrain.recipe.schema import Recipe
from pretrain.runtime import storage
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.runtime.untrusted import parse_json
from pretrain.samples.narrated import NarratedClips

#: Sentences in one forward pass of the text tower.
SENTENCES = 256
#: Temperature of the dual softmax over cosines: CLIP's similarities are a hundred times as large.
DUAL = 0.01
#: Name of the held-out source.
HELD_OUT = "held out"
Measure = Literal["retrieval", "sorting", "recognition"]


@dataclass
class HeldOutClips:
    """Videos that the model is judged by while training."""

    shards: str | None = None
    """folder (any fsspec URL) of held-out videos; null: nothing is measured"""
    measure: Measure = "retrieval"
    """retrieval: of videos by their captions and back; sorting: of the segments of narrated videos; recognition: of
    labels, zero-shot"""
    every_epochs: float = 1
    """epochs between two measures; fractions are allowed"""
    micro: int = 32
    """clips in one forward pass of one rank"""
    class_names: str | None = None
    """recognition: a file (any URL) with a name a line in the order of the class numbers, or label2id.json"""
    templates: str = "a person {}"
    """recognition: a sentence with {} in the place of the class, or a file (any URL) with one a line"""
    dual_softmax: bool = False
    """retrieval: similarities times their softmax over queries, which needs all queries at once"""


class JudgedClips(NamedTuple):
    """Clips of one rank: their numbers in the set, labels, normalised embeddings [V, E], texts', logits of places."""

    numbers: list[int]
    labels: list[str]
    video: Tensor
    text: Tensor | None
    order: Tensor | None


class VideoTextEvaluation:
    """A measure for the engine, equal on all ranks.

    Args:
        recipe: the run, with objective.held_out.shards.
        ranks: this process among all; the videos are dealt out.

    Raises:
        DataError: the shards can't be read.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        options: HeldOutClips = recipe.objective.held_out
        assert options.shards is not None
        self.every_epochs: float = options.every_epochs
        self.best_by = {"retrieval": "t2v_R@1", "sorting": "placed", "recognition": "top1"}[options.measure]
        self._options, self._ranks, self._stage = options, ranks, recipe.zero.stage
        narrated = [HELD_OUT] if options.measure == "sorting" else []
        self._samples = NarratedClips(
            recipe.input, recipe.run.seed, narrated=narrated, texts=options.measure != "recognition"
        )
        self._clips = HeldOut(
            HELD_OUT, options.shards, self._samples, ranks, options.micro, recipe.data.deadline_s,
            labelled=options.measure == "recognition",
        )  # fmt: skip

    def __call__(self, objective: Any) -> dict[str, float]:
        """Measure. All ranks call it; `objective` is in evaluation mode.

        Raises:
            DataError: no video can be read, or a label is no class.
        """
        judged = [self._judge(objective, batch.rows, batch.numbers, batch.labels) for batch in self._clips.batches()]
        if self._stage == 3:
            # With sharded weights every rank takes part in every forward pass, also one that has fewer videos.
            for _ in range(self._clips.most_batches - len(judged)):
                self._judge(objective, self._clips.blank(), [], [])
        every = [one for part in gather_objects(self._ranks, judged) for one in part if one.numbers]
        if not every:
            raise DataError(f"objective.held_out.shards={self._clips.url}: no video can be read; see above")
        return self._scores(objective, _in_order(every))

    @torch.no_grad()
    def _judge(self, objective: Any, rows: dict[str, Tensor], numbers: list[int], labels: list[str]) -> JudgedClips:
        if self._options.measure == "recognition":
            return JudgedClips(numbers, labels, normalized(objective.features(rows)).cpu(), None, None)
        found = objective.embed(rows)
        video, text = (normalized(found[name]).cpu() for name in ("video", "text"))
        return JudgedClips(numbers, labels, video, text, found["order"].float().cpu())

    def _scores(self, objective: Any, judged: JudgedClips) -> dict[str, float]:
        found = {"videos": float(len(judged.video))}
        if self._options.measure == "recognition":
            names = listed_classes(self._options.class_names)
            classes = embedded_classes(objective, self._samples, self._options.templates, names, self._ranks.device)
            targets = torch.tensor(class_numbers(judged.labels, names, self._clips.url))
            return found | recognition_scores(judged.video, classes.cpu(), targets)
        assert judged.text is not None and judged.order is not None
        found |= retrieval_metrics(judged.text @ judged.video.t(), self._options.dual_softmax)
        if self._options.measure == "sorting":
            right = (judged.order.argmax(-1) == torch.arange(judged.order.shape[1])).float()
            found |= {"placed": 100 * right.mean().item(), "sorted": 100 * right.prod(1).mean().item()}
        return found


def retrieval_metrics(similarity: Tensor, dual: bool = False) -> dict[str, float]:
    """Measure retrieval in both directions.

    Args:
        similarity: cosines of texts and videos [V, V], pairs on the diagonal.
        dual: multiply them by their softmax over the queries; the usual form (not in the official code).

    Returns:
        R@1, 5, 10, 50 in percent, median and mean rank, and the geometric mean of R@1, 5, 10, of text to video (t2v_)
        with the best of tied ranks, and of video to text (v2t_) with their mean, as published.
    """
    found: dict[str, float] = {}
    truth = torch.arange(len(similarity))
    directions: tuple[tuple[str, Tensor, Ties], ...] = (("t2v", similarity, "best"), ("v2t", similarity.t(), "mean"))
    for name, matrix, ties in directions:
        found |= retrieval_scores(dual_softmax(matrix, DUAL) if dual else matrix, truth, ties).named(name)
    return found


def recognition_scores(video: Tensor, classes: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute top-1 and top-5 in percent of normalised clips [V, E] by normalised classes [C, E]."""
    logits = 100 * video @ classes.t()
    return {f"top{k}": accuracy(logits, targets, k) for k in (1, 5)}


def listed_classes(where: str | None) -> list[str]:
    """Read the names of classes: a line each, or the keys of a JSON object in the order of the file.

    Raises:
        DataError: there is no such file, it has another content, or a name occurs twice.
    """
    if where is None:
        raise DataError("class_names: null; recognition needs a file with a name a line, or label2id.json")
    if not where.endswith(".json"):
        return class_names(where)
    try:
        content = parse_json(storage.read_bytes(where))
    except (StorageError, ValueError) as error:
        raise DataError(f"class_names={where}: {error}; allowed: a JSON object, name to number") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"class_names={where}: holds {type(content).__name__}, allowed: an object, name to number")
    return [str(name) for name in content]


@torch.no_grad()
def embedded_classes(
    objective: Any, samples: NarratedClips, templates: str, names: Sequence[str], device: torch.device
) -> Tensor:
    """Embed classes: the normalised mean of their sentences' normalised embeddings, [C, E]."""
    written = [[templates.replace(MARK, name)] for name in names] if MARK in templates else sentences(templates, names)
    flat = [text for one in written for text in one]
    rows = torch.cat([normalized(objective.model.text(ids.to(device))) for ids in _chunks(samples.captions(flat))])
    return normalized(rows.unflatten(0, (len(names), -1)).mean(1))


def class_numbers(labels: Sequence[str], names: Sequence[str], url: str) -> list[int]:
    """Number labels: names of classes, whatever case and underscores, or numbers.

    Raises:
        DataError: a label is no class.
    """
    places = {_plain(name): number for number, name in enumerate(names)}
    found = [places.get(_plain(label), int(label) if label.isdecimal() else -1) for label in labels]
    if wrong := sorted({label for label, number in zip(labels, found, strict=True) if not 0 <= number < len(names)}):
        raise DataError(
            f"{url}: {len(wrong)} labels are no class, {wrong[0]!r} for example; allowed: 0 to {len(names) - 1}, or "
            "the names in class_names"
        )
    return found


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _chunks(ids: Tensor) -> Iterator[Tensor]:
    yield from ids.split(SENTENCES)


def _in_order(judged: Sequence[JudgedClips]) -> JudgedClips:
    """Join what all ranks have judged, as one rank has it."""
    numbers = [number for one in judged for number in one.numbers]
    order = torch.tensor(numbers).argsort()
    labels = [label for one in judged for label in one.labels]

    def joined(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in judged]
        return None if parts[0] is None else torch.cat(parts)[order]

    video = joined("video")
    assert video is not None
    labels = [labels[place] for place in order.tolist()]
    return JudgedClips(sorted(numbers), labels, video, joined("text"), joined("order"))
