"""Ensembles: what several tested models said of the same videos, put together without the models."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np

from finetune.classification.predictions import INFO, Floats, Predictions, checked, read_predictions, scores
from finetune.classification.testing import rescore
from pretrain.errors import DataError, RecipeError

logger = logging.getLogger(__name__)

#: probabilities: the mean of the models' probabilities, each the mean over its views. clamped: the sum of the models'
#: raw logits, negative ones counted as 0, each the mean over its views (TDN's released program for 8 + 16 segments).
Merge = Literal["probabilities", "clamped"]
SHOWN = 3


def ensemble(places: list[Path], merge: Merge = "probabilities", out: Path | None = None) -> dict[str, float]:
    """Score several tests together, and each by itself.

    Args:
        places: run folders, of which the newest test is taken, or folders of predictions.
        merge: how they are put together.
        out: folder that the joint predictions are written to, to be scored again; None: nowhere.

    Raises:
        RecipeError: a test is named twice or alone, or `out` holds predictions already.
        DataError: a place has no test, or the tests are not of the same videos and classes.
    """
    folders = [predictions_folder(place).resolve() for place in places]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise RecipeError(f"{', '.join(twice)}: named twice, which would only weigh it twice; name each test once")
    tests = [read_predictions(folder) for folder in folders]
    joint = merged_predictions(tests, [str(folder) for folder in folders], merge)
    for folder, test in zip(folders, tests, strict=True):
        logger.info("%s: %s", folder, _line(scores(test)))
    if out is not None:
        if any(out.glob("part_*.npz")):
            raise RecipeError(f"{out}: holds predictions already; name another folder")
        joint.write_part(out, 0)
        return rescore(out)
    result = scores(joint)
    logger.info("ensemble of %d, %s: %s", len(tests), merge, _line(result))
    return result


def predictions_folder(place: Path) -> Path:
    """Find the predictions that a place means.

    Raises:
        DataError: there are none.
    """
    if (place / INFO).is_file():
        return place
    # The last by name is of the latest step: its number has leading zeros.
    found = sorted(place.glob(f"predictions/*/{INFO}"))
    if not found:
        raise DataError(f"{place}: no {INFO} and no predictions/*/{INFO}; launch/finetune.py --test last writes them")
    return found[-1].parent


def merged_predictions(tests: list[Predictions], names: list[str], merge: Merge) -> Predictions:
    """Put tests of the same videos together, with one view each.

    Args:
        tests: of the models.
        names: of the tests, for messages.
        merge: how.

    Raises:
        RecipeError: fewer than two, or no classes to be merged in this way.
        DataError: videos, labels or classes differ.
    """
    if len(tests) < 2:
        raise RecipeError("an ensemble needs two tests or more")
    first = tests[0]
    for test, name in zip(tests[1:], names[1:], strict=True):
        if (test.task, test.names) != (first.task, first.names):
            raise DataError(f"{names[0]}, {name}: tests of other tasks or classes; an ensemble has the same outputs")
    if merge == "clamped" and first.task != "single":
        raise RecipeError(f"clamped: found a test of task {first.task}, allowed: single; take probabilities")
    unread = sorted({line for test in tests for line in test.unreadable})
    common = _common_keys(tests, names, {line.partition(": ")[0] for line in unread})
    rows = [_rows(test, common) for test in tests]
    targets = first.targets[rows[0]]
    for test, name, places in zip(tests, names, rows, strict=True):
        if not np.array_equal(test.targets[places], targets):
            raise DataError(f"{names[0]}, {name}: the same videos have other labels; test both on the same shards")
    parts = [test.merged[places] if merge == "probabilities" else _clamped(test)[places]
             for test, places in zip(tests, rows, strict=True)]  # fmt: skip
    logits = _as_logits(np.mean(parts, axis=0), first.task) if merge == "probabilities" else np.sum(parts, axis=0)
    return checked(Predictions(first.task, first.names, common, targets, logits[:, None].astype(np.float32), unread))


def _common_keys(tests: list[Predictions], names: list[str], unread: set[str]) -> list[str]:
    """List the videos that all tests are of; those that one of them could not read are in none of the scores."""
    known = set().union(*(test.keys for test in tests)) - unread
    for test, name in zip(tests, names, strict=True):
        if lacking := sorted(known - set(test.keys)):
            raise DataError(
                f"{name}: {len(lacking)} videos of the other tests are not in it, such as "
                f"{', '.join(lacking[:SHOWN])}; test all models on the same shards"
            )
    return sorted(known)


def _rows(test: Predictions, keys: list[str]) -> np.ndarray:
    place = {key: number for number, key in enumerate(test.keys)}
    return np.array([place[key] for key in keys], dtype=np.int64)


def _clamped(test: Predictions) -> Floats:
    clamped: Floats = np.maximum(test.logits, 0).mean(axis=1)
    return clamped


def _as_logits(values: Floats, task: str) -> Floats:
    """Give logits whose probabilities are `values`, so that what is written can be scored like any test."""
    if task == "regression":
        return values
    # Of a probability that was rounded to 0 the logarithm is infinite.
    least = np.finfo(np.float32).tiny
    logits: Floats = np.log(np.maximum(values, least))
    return logits if task == "single" else logits - np.log(np.maximum(1 - values, least))


def _line(result: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in result.items())
