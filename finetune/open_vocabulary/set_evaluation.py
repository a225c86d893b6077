"""Judgement of a segmenter on packed pictures with masks: one matrix of all pixels, one metric for all sets."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.open_vocabulary.protocols import SetProtocol
from finetune.open_vocabulary.text_segmenter import TextSegmenter
from finetune.segmentation.judged_pictures import write_classes
from pretrain.data.held_out import HeldOut
from pretrain.errors import DataError
from pretrain.metrics.segmentation import segmentation_confusion, segmentation_scores
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.samples import picture_mask

logger = logging.getLogger(__name__)

#: Longest time of one read, seconds.
DEADLINE_S = 300.0
#: Name of the class of pixels that are none of the others.
BACKGROUND = "background"


def evaluate_set(
    segmenter: TextSegmenter, protocol: SetProtocol, names: Sequence[str], shards: str, threshold: float, ranks: Ranks
) -> tuple[dict[str, float], Any, list[str]]:
    """Judge all pictures of a set. All ranks call it and get the same.

    Args:
        segmenter: on this rank's device.
        protocol: of the set.
        names: of its classes, without the background.
        shards: folder with pictures and masks (pack.py --kind image --with mask.png=FOLDER), any fsspec URL.
        threshold: mask of the background, where the set has one.
        ranks: this process among all.

    Returns:
        Scores in percent, the matrix of pixels, and the classes' names in its order.

    Raises:
        DataError: no picture can be read, or as many names as the set has classes are needed.
    """
    if len(names) != protocol.count:
        raise DataError(f"{protocol.what}: {len(names)} class names, allowed: {protocol.count}, the background aside")
    every = [BACKGROUND, *names] if protocol.background else list(names)
    options = picture_mask.Config(first_class=protocol.first_class, ignored=protocol.ignored)
    # One at a time, since they differ in size.
    samples = _Originals(options, 0, len(every))
    held_out = HeldOut(protocol.what, shards, samples, ranks, 1, DEADLINE_S, labelled=False)
    classes = segmenter.classes(names)
    confusion, pictures = torch.zeros(len(every), len(every) + 1, dtype=torch.int64), 0
    for batch in held_out.batches():
        picture, truth = batch.rows["video"][0, 0].cpu().numpy(), batch.rows["mask"][0].cpu()
        found = segmenter.labels(picture, classes, threshold if protocol.background else None)
        confusion += segmentation_confusion(truth, found.cpu(), len(every))
        pictures += 1
    parts = gather_objects(ranks, (confusion, pictures))
    total, count = torch.stack([part for part, _ in parts]).sum(0), sum(number for _, number in parts)
    if not count:
        raise DataError(f"{shards}: no picture with a mask can be read; see above")
    scores = segmentation_scores(total)
    found_scores = {
        "mIoU": 100 * scores.mean_iou, "mean_accuracy": 100 * scores.mean_accuracy,
        "pixel_accuracy": 100 * scores.pixel_accuracy, "pictures": float(count),
    }  # fmt: skip
    return found_scores, total, every


def write_scores(folder: Path, scores: dict[str, float], confusion: Any, names: Sequence[str]) -> None:
    """Write scores.json and per_class.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    write_classes(segmentation_scores(confusion), confusion, names, folder / "per_class.csv")


def own_protocol(names: Sequence[str], background: bool, first_class: int, ignored: int) -> SetProtocol:
    """Make the protocol of a user's own set."""
    return SetProtocol("own set", tuple(names), len(names), background, first_class, ignored)


class _Originals(picture_mask.MaskedPictures):
    """Pictures as they are: the segmenter brings them to its size, and answers are judged at the mask's."""

    def judged(self, picture: Any) -> Any:
        return picture
