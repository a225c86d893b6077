"""What is in a checkpoint, and what is in an engine of another layout after loading it, with real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.consolidate import merged
from pretrain.errors import CheckpointError


@pytest.fixture(scope="module")
def written_by_two(layouts: Any) -> Path:
    folder: Path = layouts.folder / "reshape"
    return folder


#: Ranks, every n-th of the 48 loads, and how many these are: by threes each change of stage comes once.
LOADS = [(1, 3, 16), (3, 5, 10), pytest.param(1, 1, 48, marks=pytest.mark.faults)]


@pytest.mark.parametrize(("ranks", "every", "pairs"), LOADS)
def test_everything_is_the_same_on_another_layout(ranks: int, every: int, pairs: int, layouts: Any) -> None:
    """AdamW and SGD, fp32 and bf16, from every stage to every stage: weights, moments, steps, frozen parts, buffers."""
    lines = [line for line in layouts.read(ranks, every) if line.startswith("LOADED")]
    assert len(lines) == pairs
    assert [line for line in lines if not line.endswith(": same")] == []


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("variant", [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "sgd")])
def test_merged_weights_are_what_deepspeed_puts_together(
    variant: tuple[str, str], stage: int, written_by_two: Path
) -> None:
    """Float32 masters of what is trained, frozen parts, buffers; sizes that two ranks do not divide."""
    folder = written_by_two / f"{variant} {stage}"
    expected, found = torch.load(folder / "content.pt"), merged(folder / "deepspeed", 2, stage)
    names = ["first", "shift", "second", "unused"]
    # Without ZeRO the float32 copies of bf16 weights have no names.
    masters = "forward " if stage == 0 else ""
    assert found.keys() == {*names, "frozen", "average", "count"}
    for name in names:
        assert found[name].dtype == torch.float32 and torch.equal(found[name], expected[f"{masters}{name}"]), name
    assert torch.equal(found["frozen"], expected["forward frozen"])
    assert torch.equal(found["average"], expected["average"]) and torch.equal(found["count"], expected["count"])


def test_a_rank_that_is_missing_is_not_merged_without(written_by_two: Path) -> None:
    for stage, kind in ((1, "optim"), (2, "optim"), (3, "model")):
        with pytest.raises(CheckpointError, match=f"1 of 3 files missing: .*{kind}_states"):
            merged(written_by_two / f"('bf16', 'adamw') {stage}" / "deepspeed", 3, stage)
