"""Averages, momentum teachers, queues and banks: real processes, every ZeRO stage, other numbers of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.consolidate import consolidated_state
from pretrain.checkpoint.folders import folder_of
from pretrain.models.averages import split_averages

VARIANTS = ("fp32 0", "fp32 1", "fp32 2", "fp32 3", "bf16 1", "bf16 3", "bf16 3 in shards")

#: Checked of each variant: numbers, evaluation, a checkpoint on the same ranks.
CHECKS = 12


@pytest.fixture(scope="module")
def written_by_two(layouts: Any) -> tuple[Path, list[str]]:
    return layouts.folder / "state", layouts.written


@pytest.mark.parametrize("variant", VARIANTS)
def test_averages_teacher_and_resume_on_two_ranks(variant: str, written_by_two: tuple[Path, list[str]]) -> None:
    """Against sums in float64, against a model of its own, and bit for bit after loading."""
    lines = [line for line in written_by_two[1] if line.startswith(f"CHECKED {variant} ")]
    lines = [line for line in lines if variant.endswith("in shards") or "in shards" not in line]
    assert len(lines) == CHECKS
    assert [line for line in lines if not line.endswith(": same")] == []


@pytest.mark.parametrize(("ranks", "every", "checks"), [(1, 3, 12), (3, 5, 13)])
def test_all_of_it_on_other_ranks_and_stages(ranks: int, every: int, checks: int, layouts: Any) -> None:
    """Averages as the weights; a bank by positions, a queue that all have, noise that starts anew."""
    lines = [line for line in layouts.read(ranks, every) if line.startswith("CHECKED")]
    assert len(lines) == checks
    assert [line for line in lines if not line.endswith(": same")] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_averages_for_export(variant: str, written_by_two: tuple[Path, list[str]]) -> None:
    folder = written_by_two[0] / variant
    expected = torch.load(folder / "expected.pt")
    weights, averages = split_averages(consolidated_state(folder_of(folder, 3)))
    assert averages.keys() == {"hidden.weight", "hidden.bias", "out.weight", "scale", "level"}
    assert weights.keys() == averages.keys() | {"table", "count"}
    for name, value in averages.items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[f"average {name}"]), name
        assert not torch.equal(value, weights[name]), "averages are not the live weights"


def test_files_hold_shares_and_what_is_equal_once(written_by_two: tuple[Path, list[str]]) -> None:
    folder = folder_of(written_by_two[0] / "fp32 3", 3)
    for rank, sizes in enumerate(([18, 3], [17, 2])):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        module = torch.load(folder / "deepspeed" / name, weights_only=False)["module"]
        assert [len(module[f"average.hidden|{part}"]) for part in ("weight", "bias")] == sizes
    files = [torch.load(folder / "rank_state" / f"rank_{rank:05d}.pt") for rank in range(2)]
    assert [set(file) for file in files] == [{"queue", "bank", "noise"}, {"bank", "noise"}]
