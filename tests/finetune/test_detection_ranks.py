"""Two ranks train, validate and test a detector of each kind as one rank does."""

import json
from typing import Any

import numpy as np
import pytest

from tests.finetune.conftest import Toy
from tests.finetune.test_cycleacr_run import HEAD
from tests.finetune.test_detection_run import boxed
from tests.finetune.test_evad import RECIPE as EVAD
from tests.toy_run import train
from tests.toy_shards import ROOT

__all__ = ["boxed"]

pytestmark = pytest.mark.faults

#: The same micro-batches on one rank and on two, with as many persons in each: EVAD's terms are means over a
#: micro-batch, or over the persons of all ranks' micro-batches.
KINDS = {"detection": (), "cycleacr": HEAD, "evad": ()}


@pytest.fixture(scope="module")
def ends(boxed: Toy) -> dict[tuple[str, int], list[Any]]:
    """Exit code and scores of the test, by kind and ranks; all runs of a number of ranks in one start."""
    (boxed.folder / "evad.yaml").write_text(EVAD.replace("FOLDER", str(boxed.folder)))
    found = {}
    for ranks in (1, 2):
        plan = [
            {
                "program": "finetune",
                "recipe": str(boxed.folder / "evad.yaml" if kind == "evad" else boxed.recipe),
                "overrides": [f"run.dir={boxed.folder / f'{kind} {ranks}'}", "schedule.epochs=1", *words],
                "planned": False,
            }
            for kind, words in KINDS.items()
        ]
        (boxed.folder / "plan.json").write_text(json.dumps(plan))
        words = [ROOT / "tests/extensions/driver.py", boxed.folder / "plan.json"]
        output = train(words, ranks, ROOT, timeout_s=500)
        (line,) = [line for line in output.splitlines() if line.startswith("ENDS ")]
        for kind, end in zip(KINDS, json.loads(line.removeprefix("ENDS ")), strict=True):
            assert end[0] == 0, end
            found[kind, ranks] = end
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_one_learns(kind: str, boxed: Toy, ends: dict[tuple[str, int], list[Any]]) -> None:
    one, two = (
        [float(record["train/loss"]) for record in boxed.records(f"{kind} {ranks}") if "train/loss" in record]
        for ranks in (1, 2)
    )
    assert len(one) == 3 and np.ptp(one) > 0.001, "a curve that does not move proves nothing"
    np.testing.assert_allclose(two, one, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_judge_each_keyframe_once(kind: str, boxed: Toy, ends: dict[tuple[str, int], list[Any]]) -> None:
    scores = [ends[kind, ranks][1] for ranks in (1, 2)]
    assert scores[0]["keyframes"] == scores[1]["keyframes"] == 11
    files = [boxed.folder / f"{kind} {ranks}" / "predictions" / "step_00000003" / "detections.csv" for ranks in (1, 2)]
    one, two = ([line.split(",") for line in path.read_text().splitlines()] for path in files)
    assert len(one) > 11 and [row[:2] + row[6:7] for row in one] == [row[:2] + row[6:7] for row in two]
    numbers = [np.array([[float(value) for value in row[2:6] + row[7:]] for row in rows]) for rows in (one, two)]
    np.testing.assert_allclose(*numbers, atol=1e-3)
