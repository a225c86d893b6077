"""Rules by which queues and banks are written and restored, and what is refused."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.rank_state import RankState, digests, load_rank_state, unequal, write_rank_state
from pretrain.errors import CheckpointError

POSITIONS, SAME, ANEW = "concatenate_positions", "same_on_all", "start_anew"


def write(folder: Path, ranks: list[Mapping[str, RankState]]) -> None:
    for rank, states in enumerate(ranks):
        write_rank_state(folder, states, rank)


def dealt(values: Tensor, ranks: int) -> list[Mapping[str, RankState]]:
    return [{"bank": RankState(values[rank::ranks].clone(), POSITIONS)} for rank in range(ranks)]


@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("now", [1, 2, 3, 4])
def test_rows_are_dealt_again_by_position(before: int, now: int, tmp_path: Path) -> None:
    """7 rows of 2 values, which no number of ranks above one divides."""
    values = torch.randn(7, 2).to(torch.bfloat16)
    values[3, 1] = torch.nan
    write(tmp_path, dealt(values, before))
    for rank, states in enumerate(dealt(torch.zeros_like(values), now)):
        load_rank_state(tmp_path, states, before, rank, now)
        assert torch.equal(states["bank"].tensor.view(torch.int16), values[rank::now].view(torch.int16))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64]
)
def test_any_format_and_size_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    for number, shape in enumerate([(), (0, 4), (3, 2)]):
        kept = {rule: RankState(torch.ones(shape).to(dtype), rule) for rule in (POSITIONS, SAME, ANEW)}
        write(tmp_path / str(number), [kept, kept])
        assert len(digests(kept)[SAME]) == 32
        for rank in range(2):
            empty = {rule: RankState(torch.zeros(shape).to(dtype), rule) for rule in kept}
            load_rank_state(tmp_path / str(number), empty, 2, rank, 2)
            assert all(torch.equal(empty[rule].tensor, kept[rule].tensor) for rule in kept)


def test_what_starts_anew_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [{"noise": RankState(torch.ones(3), ANEW)}] * 2)
    here = {"noise": RankState(torch.zeros(3), ANEW)}
    load_rank_state(tmp_path, here, 2, 0, 1)
    assert here["noise"].tensor.tolist() == [0, 0, 0]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "noise STARTS ANEW" in record.message and "written by 2 ranks, this run has 1" in record.message


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path, dealt(torch.zeros(6, 2), 2))
    here = {"bank": RankState(torch.zeros(1, 2), POSITIONS)}
    with pytest.raises(
        CheckpointError, match=r"bank, dealt from 2 to 4 ranks: found .*\[2, 2\], this run has .*\[1, 2\]"
    ):
        load_rank_state(tmp_path, here, 2, 0, 4)


@pytest.mark.parametrize(
    ("here", "found"),
    [
        ({}, "bank concatenate_positions -> missing"),
        ({"bank": RankState(torch.zeros(3), SAME)}, "bank concatenate_positions -> same_on_all"),
        (
            {"bank": RankState(torch.zeros(3), POSITIONS), "q": RankState(torch.zeros(1), SAME)},
            "q missing -> same_on_all",
        ),
    ],
)
def test_another_objective_is_refused(here: dict[str, RankState], found: str, tmp_path: Path) -> None:
    write(tmp_path, dealt(torch.zeros(6), 2))
    with pytest.raises(CheckpointError, match=f"{found}.*run.init_weights"):
        load_rank_state(tmp_path, here, 2, 0, 2)


def test_a_run_without_any_writes_no_file_and_needs_none(tmp_path: Path) -> None:
    assert write_rank_state(tmp_path, {}, 0) == []
    assert write_rank_state(tmp_path, {"queue": RankState(torch.ones(2), SAME)}, 1) == []
    assert list(tmp_path.iterdir()) == []
    load_rank_state(tmp_path, {}, 2, 0, 1)


def test_values_that_should_be_equal_are_compared_by_their_bytes() -> None:
    def of(value: float) -> dict[str, str]:
        return digests({"queue": RankState(torch.tensor([value, 1.0]), SAME), "own": RankState(torch.rand(2), ANEW)})

    assert unequal([of(0.5), of(0.5), of(0.5)]) == [] == unequal([of(torch.nan), of(torch.nan)])
    assert "rank 2 of 3 have other values than rank 0" in unequal([of(0.0), of(0.0), of(-0.0)])[0]
    assert "rank 1 and others" in unequal([of(1.0), of(2.0), of(3.0)])[0]
    assert unequal([of(1.0), {}]) != []
