"""The best checkpoint: chosen by the metric, kept by retention, compared across resumes."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from pretrain.checkpoint.folders import apply_retention, folder_of, published, step_of
from pretrain.checkpoint.same_run import is_harmless
from pretrain.engine.evaluation import Best, every_steps
from pretrain.engine.schedules import Schedule


def test_first_of_the_highest_is_best(tmp_path: Path) -> None:
    best = Best()
    assert not best.consider(1, "top1", math.nan) and best.steps == set(), "nor the first of all, for ever"
    outcome = [best.consider(step, "top1", value) for step, value in ((2, 10.0), (4, 12.0), (6, 12.0), (8, 11.0))]
    assert outcome == [True, True, False, False] and best.steps == {4}
    assert not best.consider(10, "top1", math.nan), "a broken evaluation is never the best"
    best.write(tmp_path / "best.json")
    assert Best(**json.loads((tmp_path / "best.json").read_text())) == Best(**asdict(best)) == best


def test_best_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        folder_of(tmp_path, step).mkdir()
    assert apply_retention(tmp_path, 1, None, {4}) == [2, 6]
    assert [step_of(folder) for folder in published(tmp_path)] == [4, 8]
    assert apply_retention(tmp_path, 1, None, {8}) == [4], "until another one is the best"


def test_evaluation_may_come_several_times_an_epoch() -> None:
    class Half:
        every_epochs = 0.5
        best_by = "top1"

        def __call__(self, objective: object) -> dict[str, float]:
            return {}

    schedule = Schedule(10, 100, 100, 0, 1.0, 0.0)
    assert every_steps(Half(), schedule) == 5
    Half.every_epochs = 0.01
    assert every_steps(Half(), schedule) == 1


def test_where_evaluation_looks_may_change_in_a_run() -> None:
    assert is_harmless("evaluate.clips") and is_harmless("data.sources.k400.val")
    assert not is_harmless("augment.mixup") and not is_harmless("data.sources.k400.flip")
