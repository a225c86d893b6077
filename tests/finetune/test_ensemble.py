"""Tests of several models together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.classification.ensemble import ensemble, merged_predictions
from finetune.classification.predictions import Predictions, read_predictions, scores
from finetune.commands.finetune import main
from pretrain.errors import DataError, RecipeError

NAMES = ["a", "b", "c"]


def test_of(seed: int, views: int = 2, keys: tuple[str, ...] = ("k0", "k1", "k2", "k3"), **changes: Any) -> Predictions:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(keys), views, 3)).astype(np.float32)
    targets = np.array([int(key[1:]) % 3 for key in keys])
    made = {"task": "single", "names": NAMES, "keys": list(keys), "targets": targets, "logits": logits}
    return Predictions(**made | changes)


test_of.__test__ = False  # type: ignore[attr-defined]


def test_probabilities_are_averaged_over_models() -> None:
    one, other = test_of(0), test_of(1, views=6)
    joint = merged_predictions([one, other], ["one", "other"], "probabilities")
    np.testing.assert_allclose(joint.merged, (one.merged + other.merged) / 2, rtol=1e-5)


def test_raw_logits_are_clamped_and_added() -> None:
    one, other = test_of(0, views=1), test_of(1, views=1)
    joint = merged_predictions([one, other], ["one", "other"], "clamped")
    expected = np.maximum(one.logits[:, 0], 0) + np.maximum(other.logits[:, 0], 0)
    np.testing.assert_allclose(joint.logits[:, 0], expected)
    # A model that is sure of one class by a large negative logit of the others says nothing of it.
    sure = np.array([[[5.0, -9, -9]]], np.float32), np.array([[[0.0, 4, 4.5]]], np.float32)
    pair = [test_of(0, keys=("k0",), logits=logits) for logits in sure]
    assert merged_predictions(pair, ["a", "b"], "clamped").logits[0, 0].tolist() == [5, 4, 4.5]


def test_videos_are_matched_by_key() -> None:
    one, other = test_of(0), test_of(1, keys=("k3", "k1", "k0", "k2"))
    joint = merged_predictions([one, other], ["one", "other"], "probabilities")
    assert joint.keys == ["k0", "k1", "k2", "k3"] and joint.targets.tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(joint.merged[0], (one.merged[0] + other.merged[2]) / 2, rtol=1e-5)


def test_what_one_could_not_read_is_in_no_score() -> None:
    one, other = test_of(0), test_of(1, keys=("k0", "k1", "k3"), unreadable=["k2: decode: damaged"])
    joint = merged_predictions([one, other], ["one", "other"], "probabilities")
    assert joint.keys == ["k0", "k1", "k3"] and scores(joint)["unreadable"] == 1


@pytest.mark.parametrize(
    ("changes", "merge", "told"),
    [
        ({"keys": ("k0", "k1", "k3")}, "probabilities", "other: 1 videos of the other tests are not in it, such as k2"),
        ({"names": ["a", "b", "d"]}, "probabilities", "other tasks or classes"),
        ({"targets": np.array([0, 1, 2, 1])}, "probabilities", "the same videos have other labels"),
    ],
)
def test_other_videos_or_classes_are_refused(changes: dict[str, Any], merge: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        merged_predictions([test_of(0), test_of(1, **changes)], ["one", "other"], merge)


def test_one_test_is_no_ensemble_and_values_are_not_clamped() -> None:
    with pytest.raises(RecipeError, match="two tests or more"):
        merged_predictions([test_of(0)], ["one"], "probabilities")
    values = [test_of(seed, task="multi", targets=np.eye(4, 3, dtype=np.float32)) for seed in (0, 1)]
    with pytest.raises(RecipeError, match="found a test of task multi"):
        merged_predictions(values, ["a", "b"], "clamped")
    joint = merged_predictions(values, ["a", "b"], "probabilities")
    np.testing.assert_allclose(joint.merged, (values[0].merged + values[1].merged) / 2, rtol=1e-4)


def test_as_a_user(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for seed in (0, 1):
        test_of(seed).write_part(tmp_path / f"run{seed}" / "predictions" / "step_00000002", 0)
    runs = [str(tmp_path / f"run{seed}") for seed in (0, 1)]
    assert main(["--ensemble", *runs]) == 0
    assert caplog.text.count("top1") == 3 and "ensemble of 2, probabilities" in caplog.text
    out = tmp_path / "joint"
    assert main(["--ensemble", *runs, "--merge", "clamped", "--out", str(out)]) == 0
    assert (out / "scores.json").is_file() and read_predictions(out).logits.shape == (4, 1, 3)
    assert main(["--ensemble", *runs, "--out", str(out)]) == 2 and "name another folder" in capsys.readouterr().err
    assert main(["--ensemble", *runs, runs[0]]) == 2 and "run0" in (told := capsys.readouterr().err)
    assert "named twice" in told
    assert main(["--ensemble", runs[0], str(tmp_path)]) == 1
    assert "no predictions.json and no predictions/" in capsys.readouterr().err
    assert main(["--rescore", str(out)]) == 0
    assert ensemble([Path(runs[0]), out])["videos"] == 4
