"""Predictions of a set of videos, view by view: merged, scored, written, and scored again without the model.

A folder holds `predictions.json` (task, class names, unreadable videos) and one `part_00000.npz` a rank with

    keys      [n]         source/shard/key of each video: unique, unlike a file's base name
    targets   [n] or [n, K]
    logits    [n, V, K]   of each view, float32
"""

import json
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from finetune.classification.labels import Task
from pretrain.errors import DataError
from pretrain.metrics import ranking
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

INFO = "predictions.json"
Floats = npt.NDArray[np.float32]


@dataclass
class Predictions:
    """Predictions of a model for some videos.

    Attributes:
        task: what `targets` and `logits` mean.
        names: class names in order.
        keys: source/shard/key of each video.
        targets: int64 [n] (single), float32 [n, K] (multi, regression).
        logits: float32 [n, V, K].
        unreadable: `key: reason` of videos that could not be read; they are in no score.
        average: what the mean over views is taken of.
    """

    task: Task
    names: list[str]
    keys: list[str]
    targets: npt.NDArray[Any]
    logits: Floats
    unreadable: list[str] = field(default_factory=list)
    average: Literal["probabilities", "logits"] = "probabilities"

    @property
    def merged(self) -> Floats:
        """Probabilities (regression: values) [n, K]: the mean over views of each view's own, or that of mean logits.

        Softmax comes before the mean: averaging logits instead costs about half a point on Kinetics-400.
        """
        logits = self.logits.mean(axis=1, keepdims=True) if self.average == "logits" else self.logits
        if self.task == "regression":
            return logits.mean(axis=1)
        if self.task == "multi":
            return (1 / (1 + np.exp(-logits))).mean(axis=1)
        # Less the largest: exp of 89 is infinite in float32.
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probabilities: Floats = (shifted / shifted.sum(axis=-1, keepdims=True)).mean(axis=1)
        return probabilities

    def write_part(self, folder: Path, rank: int) -> None:
        """Write this rank's videos; rank 0 also what all have in common."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            # dtype=str: an empty list is saved as floats otherwise.
            folder / f"part_{rank:05d}.npz", keys=np.array(self.keys, dtype=str), targets=self.targets,
            logits=self.logits, unreadable=np.array(self.unreadable, dtype=str),
        )  # fmt: skip
        if rank == 0:
            info = {"task": self.task, "average": self.average, "classes": self.names}
            (folder / INFO).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def read_predictions(folder: Path) -> Predictions:
    """Read all parts of a folder.

    Raises:
        DataError: not such a folder, or a video occurs twice.
    """
    if not (folder / INFO).is_file():
        raise DataError(f"{folder}: no {INFO}; predictions are written by a test, launch/finetune.py --test")
    info = parse_json((folder / INFO).read_text(encoding="utf-8"))
    parts = [dict(np.load(path)) for path in sorted(folder.glob("part_*.npz"))]
    # A rank without videos has targets [0], which can't be joined to [n, K].
    filled = [part for part in parts if len(part["keys"])]
    if not filled:
        raise DataError(f"{folder}: no predictions in {len(parts)} parts")
    joined = {name: np.concatenate([part[name] for part in filled]) for name in ("keys", "targets", "logits")}
    unreadable = [str(line) for part in parts for line in part["unreadable"]]
    return checked(
        Predictions(
            info["task"],
            info["classes"],
            joined["keys"].tolist(),
            joined["targets"],
            joined["logits"],
            unreadable,
            info.get("average", "probabilities"),
        )  # fmt: skip
    )


def checked(predictions: Predictions) -> Predictions:
    """Check predictions and put them in the order of the keys.

    Raises:
        DataError: a key occurs twice, so that a video would count twice.
    """
    twice = [key for key, count in Counter(predictions.keys).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} videos were predicted twice, such as {twice[0]}")
    # By key, so that any number of ranks gives the same files.
    order = sorted(range(len(predictions.keys)), key=predictions.keys.__getitem__)
    predictions.keys = [predictions.keys[i] for i in order]
    predictions.targets, predictions.logits = predictions.targets[order], predictions.logits[order]
    return predictions


def scores(predictions: Predictions) -> dict[str, float]:
    """Compute metrics in percent (regression: in the labels' units) by name; the first one is the headline."""
    merged, targets = predictions.merged, predictions.targets
    broken = int((~np.isfinite(merged)).any(axis=1).sum())
    if broken:
        logger.warning("%d of %d videos have predictions that are not finite; they count as wrong", broken, len(merged))
    if predictions.task == "regression":
        return _regression_scores(merged, targets)
    if predictions.task == "multi":
        values = [average_precision(merged[:, k], targets[:, k]) for k in range(merged.shape[1])]
        # Classes without a positive have no precision; counted as 0 they would lower mAP with the choice of videos.
        known = [value for value in values if not math.isnan(value)]
        result = {"mAP": 100 * float(np.mean(known)) if known else float("nan"), "classes": float(len(known))}
    else:
        picked = np.take_along_axis(merged, targets[:, None], axis=1)
        above, counts = ranks(merged, targets), ranking.counts_of(merged.shape[1])
        result = {f"top{k}": 100 * float((above < k).mean()) for k in counts}
        result["mean_class_accuracy"] = 100 * float(np.nanmean(class_accuracy(predictions)))
        # One probability that was rounded to 0 would make the mean infinite.
        result["loss"] = float(-np.log(np.maximum(picked, 1e-12)).mean())
    return result | {"videos": float(len(merged)), "unreadable": float(len(predictions.unreadable))}


def ranks(merged: Floats, targets: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Count the classes that have a higher probability than the right one, [n]; of equal ones, half count; NaN last."""
    return np.asarray(ranking.ranks(torch.from_numpy(merged), torch.from_numpy(targets)), dtype=np.int64)


def class_accuracy(predictions: Predictions) -> npt.NDArray[np.float64]:
    """Compute the share of each class' videos that are classified right, [K]; NaN for a class without any."""
    table = confusion(predictions).astype(np.float64)
    # Not the table's sums, which lack the videos without a prediction.
    totals = np.bincount(predictions.targets, minlength=len(table)).astype(np.float64)
    return np.divide(table.diagonal(), totals, out=np.full(len(totals), np.nan), where=totals > 0)


def confusion(predictions: Predictions) -> npt.NDArray[np.int64]:
    """Count videos of true class (row) and predicted class (column), [K, K]; those predicted NaN are in no cell."""
    classes = predictions.logits.shape[-1]
    found = ranking.predicted(torch.from_numpy(predictions.merged)).numpy()
    pairs = (predictions.targets * classes + found)[found >= 0]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def average_precision(score: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    """Average the precision at each positive, equal scores taken together; NaN without positives.

    A score of NaN counts as wrong: behind all others for a positive, before them for a negative.
    """
    if not truth.any():
        return float("nan")
    score = np.where(np.isnan(score), np.where(truth > 0, -np.inf, np.inf), score)
    order = np.argsort(-score, kind="stable")
    hits, ordered = truth[order] > 0, score[order]
    # Where a group of equal scores ends; not by their difference, which is NaN between infinities.
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)
    found = np.cumsum(hits)[last]
    gained = np.diff(found, prepend=0)
    return float((found / (last + 1) * gained).sum() / found[-1])


def _regression_scores(values: Floats, targets: npt.NDArray[Any]) -> dict[str, float]:
    error = values - targets
    spread = np.square(targets - targets.mean(axis=0)).sum()
    return {
        "r2": float(1 - np.square(error).sum() / spread) if spread > 0 else float("nan"),
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "videos": float(len(values)),
    }
