"""Two ranks train, validate and test a detector of pictures as one rank does."""

import json
from typing import Any

import numpy as np
import pytest

from tests.finetune.conftest import Toy
from tests.finetune.test_coco import objects
from tests.toy_run import train
from tests.toy_shards import ROOT

__all__ = ["objects"]

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def ends(objects: Toy) -> dict[int, Any]:
    """Exit code and scores of the test, by ranks: the same micro-batches on one and on two."""
    found = {}
    for ranks in (1, 2):
        # Batch norms over a rank's micro-batch: over all ranks' rows two ranks would see eight pictures, one sees four.
        words = [f"run.dir={objects.folder / f'ranks {ranks}'}", "schedule.epochs=1", "model.batch_norm=rank"]
        plan = [{"program": "finetune", "recipe": str(objects.recipe), "overrides": words, "planned": False}]
        (objects.folder / "plan.json").write_text(json.dumps(plan))
        output = train([ROOT / "tests/extensions/driver.py", objects.folder / "plan.json"], ranks, ROOT, timeout_s=500)
        (line,) = [line for line in output.splitlines() if line.startswith("ENDS ")]
        ((code, scores),) = [end[:2] for end in json.loads(line.removeprefix("ENDS "))]
        assert code == 0
        found[ranks] = scores
    return found


def test_two_ranks_learn_what_one_learns(objects: Toy, ends: dict[int, Any]) -> None:
    one, two = (
        [float(record["train/loss"]) for record in objects.records(f"ranks {ranks}") if "train/loss" in record]
        for ranks in (1, 2)
    )
    assert len(one) == 3 and np.ptp(one) > 0.001, "a curve that does not move proves nothing"
    np.testing.assert_allclose(two, one, rtol=2e-5)


def test_two_ranks_judge_each_picture_once(objects: Toy, ends: dict[int, Any]) -> None:
    assert ends[1]["pictures"] == ends[2]["pictures"] == 6 and ends[1].keys() == ends[2].keys()
    for name, value in ends[1].items():
        assert ends[2][name] == pytest.approx(value, abs=0.5), name
    files = [objects.folder / f"ranks {ranks}/predictions/step_00000003/detections.json" for ranks in (1, 2)]
    one, two = (json.loads(path.read_text()) for path in files)
    assert [row["image_id"] for row in one] == [row["image_id"] for row in two]
    # Scores alone: of a detector that has hardly learnt they are close together, and boxes change places among them.
    for number in {row["image_id"] for row in one}:
        scores = [sorted(row["score"] for row in rows if row["image_id"] == number) for rows in (one, two)]
        np.testing.assert_allclose(*scores, atol=0.02)
