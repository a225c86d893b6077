"""Two ranks train, validate and test a segmenter as one rank does, with whole weights and with sharded ones."""

import json
from typing import Any

import numpy as np
import pytest

from tests.finetune.conftest import Toy
from tests.finetune.test_segmentation import scenes
from tests.toy_run import train
from tests.toy_shards import ROOT

__all__ = ["scenes"]

pytestmark = pytest.mark.faults

#: All values of the masks are classes, so that ranks have as many labelled pixels; windows: pictures of different sizes
#: take different numbers of passes. One rank has whole weights in both.
COMMON = ["input.first_class=0", "model.classes=5", "optim.base_lr=0.05", "schedule.epochs=2",
          "evaluate.every_epochs=1", "evaluate.test=last", "checkpoint.every_steps=6"]  # fmt: skip
KINDS = {"whole": ["zero.stage=1"], "windows": ["zero.stage=3", "objective.judge=slide", "objective.stride=16",
                                               "ema.decay=0.5"]}  # fmt: skip


@pytest.fixture(scope="module")
def ends(scenes: Toy) -> dict[tuple[str, int], list[Any]]:
    """Exit code and scores of the test, by kind and ranks; all runs of a number of ranks in one start."""
    found = {}
    (scenes.folder / "five.txt").write_text("edge\nground\nred\ngreen\nblue")
    labels = f"data.sources.toy.labels={scenes.folder / 'five.txt'}"
    for ranks in (1, 2):
        # Batch norms see the rows of all ranks: one micro-batch of all of them is the same.
        each = [*COMMON, labels, f"batch.micro={8 // ranks}"]
        words = {kind: [*each, *own, f"run.dir={scenes.folder / f'{kind} {ranks}'}",
                        *(["zero.stage=0"] if ranks == 1 else [])] for kind, own in KINDS.items()}  # fmt: skip
        plan = [
            {"program": "finetune", "recipe": str(scenes.recipe), "overrides": words[kind], "planned": False}
            for kind in KINDS
        ]
        (scenes.folder / "plan.json").write_text(json.dumps(plan))
        driver = [ROOT / "tests/extensions/driver.py", scenes.folder / "plan.json"]
        output = train(driver, ranks, ROOT, timeout_s=300)
        (line,) = [line for line in output.splitlines() if line.startswith("ENDS ")]
        for kind, end in zip(KINDS, json.loads(line.removeprefix("ENDS ")), strict=True):
            assert end[0] == 0, end
            found[kind, ranks] = end
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_learn_what_one_learns(kind: str, scenes: Toy, ends: dict[tuple[str, int], list[Any]]) -> None:
    one, two = (
        [float(record["train/loss"]) for record in scenes.records(f"{kind} {ranks}") if "train/loss" in record]
        for ranks in (1, 2)
    )
    assert len(one) == 6 and np.ptp(one) > 0.05, "a curve that does not move proves nothing"
    np.testing.assert_allclose(two, one, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_judge_each_picture_once(kind: str, scenes: Toy, ends: dict[tuple[str, int], list[Any]]) -> None:
    """Five pictures: one rank has a pass less than the other. Validation and test say the same of a step."""
    one, two = (ends[kind, ranks][1] for ranks in (1, 2))
    assert one["pictures"] == two["pictures"] == 5
    assert two == pytest.approx(one, abs=0.5)
    judged = [record for record in scenes.records(f"{kind} 2") if "eval/mIoU" in record]
    assert len(judged) == 2 and judged[-1]["eval/mIoU"] == pytest.approx(two["mIoU"], abs=1e-9)
    tables = [scenes.folder / f"{kind} {ranks}" / "predictions/step_00000006/per_class.csv" for ranks in (1, 2)]
    pixels = [[line.rsplit(",", 3)[1] for line in table.read_text().splitlines()[1:]] for table in tables]
    assert pixels[0] == pixels[1]
