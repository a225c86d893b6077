"""Scores from predictions: cases whose answer is known; tests/parity has the official merge."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from finetune.classification.predictions import (
    Predictions,
    average_precision,
    checked,
    class_accuracy,
    confusion,
    read_predictions,
    scores,
)
from finetune.classification.testing import rescore
from finetune.classification.validation import join
from pretrain.errors import DataError


def single(logits: np.ndarray, targets: list[int], keys: list[str] | None = None) -> Predictions:
    names = [f'class "{number}", drawn' for number in range(logits.shape[-1])]
    keys = keys or [f"set/shard/{number:03d}" for number in range(len(targets))]
    return Predictions("single", names, keys, np.array(targets), logits.astype(np.float32))


def drawn() -> Predictions:
    """Six videos of seven classes in 15 views."""
    return single(np.random.default_rng(0).normal(size=(6, 15, 7)) * 3, [0, 1, 2, 3, 6, 5])


def test_softmax_comes_before_the_mean() -> None:
    # One view is certain of class 0, two lean to class 1: their probabilities outvote it, their logits would not.
    logits = np.array([[[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])
    assert logits.mean(axis=1).argmax() == 0
    merged = single(logits, [1]).merged
    assert merged.argmax() == 1 and merged.sum() == pytest.approx(1)
    assert np.isfinite(single(logits * 1e4, [1]).merged).all()


def test_written_parts_are_scored_again_without_the_model(tmp_path: Path) -> None:
    predictions = drawn()
    for rank in range(3):  # the third rank had nothing to do
        rows = range(rank, 6, 2) if rank < 2 else range(0)
        part = single(predictions.logits[list(rows)], [int(predictions.targets[i]) for i in rows],
                      [predictions.keys[i] for i in rows] or ["none"][:0])  # fmt: skip
        part.unreadable = ["set/shard/bad: decode"] if rank == 2 else []
        part.write_part(tmp_path, rank)
    result = rescore(tmp_path)
    assert result == scores(predictions) | {"unreadable": 1.0}
    again = read_predictions(tmp_path)
    assert again.keys == predictions.keys and (again.logits == predictions.logits).all()
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    table = (tmp_path / "per_class.csv").read_text().splitlines()
    assert len(table) == 8 and list(csv.reader(table))[1][0] == predictions.names[0]
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    with pytest.raises(DataError, match="no predictions.json"):
        rescore(tmp_path / "elsewhere")


def test_a_video_never_counts_twice() -> None:
    logits = np.zeros((2, 1, 3))
    same_name = single(logits, [0, 1], ["a/s0/clip.mp4", "b/s0/clip.mp4"])  # equal base names are different videos
    assert scores(checked(same_name))["videos"] == 2
    with pytest.raises(DataError, match="predicted twice, such as a/s0/clip"):
        checked(join([single(logits[:1], [0], ["a/s0/clip"]), single(logits[:1], [0], ["a/s0/clip"])]))


def test_classes_and_confusion() -> None:
    logits = np.eye(3)[[0, 1, 1, 1, 0]][:, None, :] * 5
    predictions = single(logits, [0, 0, 1, 1, 1])
    assert confusion(predictions).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    np.testing.assert_allclose(class_accuracy(predictions), [1 / 2, 2 / 3, np.nan])
    found = scores(predictions)
    assert (found["top1"], found["mean_class_accuracy"]) == pytest.approx((60, 100 * 7 / 12))


def test_a_model_that_says_nothing_is_no_better_than_chance() -> None:
    # All classes equally likely: argmax alone would give class 0 everything, a strict comparison everybody.
    found = scores(single(np.zeros((30, 2, 3)), [0, 1, 2] * 10))
    assert found["top1"] == 0 and "top5" not in found, "of three classes five answers are always right"


def test_average_precision() -> None:
    assert average_precision(np.array([3.0, 2.0, 1.0]), np.array([1, 0, 1])) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.array([1.0, 1.0, 1.0, 1.0]), np.array([1, 0, 0, 0])) == pytest.approx(0.25)
    assert np.isnan(average_precision(np.zeros(2), np.zeros(2)))
    logits = np.array([[2.0, -1.0], [-2.0, 1.0]])[:, None, :]
    multi = Predictions("multi", ["a", "b"], ["x", "y"], np.eye(2, dtype=np.float32), logits.astype(np.float32))
    assert scores(multi)["mAP"] == pytest.approx(100)


def test_regression_scores() -> None:
    values = np.array([[1.0], [2.0], [3.0]], np.float32)
    views = np.stack([values - 0.5, values + 0.5], axis=1)
    found = scores(Predictions("regression", ["0"], list("abc"), values + 1, views.astype(np.float32)))
    assert (found["mae"], found["rmse"], found["r2"]) == pytest.approx((1, 1, 1 - 3 / 2))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("spoil", ["all", "right", "one other", "infinity", "one view"])
def test_a_network_of_nan_is_right_about_nothing(spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4, 7)).astype(np.float32)
    targets = [0, 1, 2, 3, 6, 5]
    for row, target in enumerate(targets):
        logits[row, :, target] += 9  # without the fault every video would be right
    sound = scores(single(logits, targets))
    assert sound["top1"] == sound["mean_class_accuracy"] == 100
    for row, target in enumerate(targets):
        where, value = {
            "all": ((row,), NAN),
            "right": ((row, slice(None), target), NAN),
            "one other": ((row, slice(None), (target + 1) % 7), NAN),
            "infinity": ((row, slice(None), target), INF),
            "one view": ((row, 2), NAN),
        }[spoil]
        logits[where] = value
    found = scores(single(logits, targets))
    assert (found["top1"], found["top5"], found["mean_class_accuracy"]) == (0, 0, 0)
    assert "6 of 6 videos have predictions that are not finite" in caplog.text
    assert confusion(single(logits, targets)).sum() == 0


def test_ties_are_neither_right_nor_wrong() -> None:
    equal = scores(single(np.zeros((6, 4, 7)), [0, 1, 2, 3, 6, 5]))
    assert (equal["top1"], equal["top5"]) == (0, 100), "the right one is the fourth of seven"


def test_a_score_of_nan_has_the_worst_precision() -> None:
    truth, score = np.array([1, 0, 1, 0]), np.array([0.9, 0.2, 0.8, 0.1])
    assert average_precision(score, truth) == 1
    worst = average_precision(-score, truth)
    assert average_precision(np.full(4, NAN), truth) == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert average_precision(np.array([NAN, 0.2, 0.8, 0.1]), truth) == pytest.approx((1 + 2 / 4) / 2)
    assert average_precision(np.array([0.9, NAN, 0.8, 0.1]), truth) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert average_precision(np.array([INF, 0.2, INF, -INF]), truth) == 1 and worst < 1
