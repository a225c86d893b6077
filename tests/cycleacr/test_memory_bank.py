"""What the memory bank holds and gives, on one rank and on several, and after a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.cycleacr.memory_bank import MemoryBank, MemoryOptions, SeenKeyframes, penalty
from pretrain.checkpoint.rank_state import RankState, load_rank_state, write_rank_state
from pretrain.errors import CheckpointError
from pretrain.runtime.process_group import Ranks
from tests.cycleacr.bank_program import DIM, VIDEOS, asked, filled, options

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
Found = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(in_worlds: Callable[[str], Found]) -> Found:
    return in_worlds("tests.cycleacr.bank_program")


def of_rank(windows: Tensor, world: int, rank: int) -> Tensor:
    """What a rank of a world asks for, among what one rank alone asks for."""
    mine = windows[rank::world]
    return mine[:3] if rank else mine


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("what", ["windows", "penalized", "capped"])
def test_windows_are_the_same_on_any_number_of_ranks(found: Found, what: str, world: int) -> None:
    expected = found[1, 0][what]
    assert float(expected.abs().max()) > 0
    for rank in range(world):
        assert torch.equal(found[world, rank][what], of_rank(expected, world, rank))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_random_subsets_are_the_run_s_own(found: Found, world: int) -> None:
    expected = found[1, 0]["random"]
    assert not torch.equal(*expected), "another step draws others"
    for rank in range(world):
        for first, second in zip(found[world, rank]["random"], expected, strict=True):
            assert torch.equal(first, of_rank(second, world, rank))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_memory(found: Found, world: int) -> None:
    held = [found[world, rank]["persons"] for rank in range(world)]
    assert sum(held) == found[1, 0]["persons"] and max(held) < sum(held)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_of_different_numbers_are_gathered_and_exchanged(found: Found, world: int) -> None:
    for rank in range(world):
        one = found[world, rank]
        assert one["ragged"] == [[10 * r + value for value in range(r)] for r in range(world)]
        assert one["exchanged"] == [10 * r + rank for r in range(world)]


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("now", [1, 2, 3])
def test_a_checkpoint_is_exact_on_any_number_of_ranks(before: int, now: int, found: Found, tmp_path: Path) -> None:
    """What ranks hold after loading is what ranks hold that have filled it themselves, to the last bit."""
    for rank in range(before):
        write_rank_state(tmp_path, {"bank": RankState(found[before, rank]["state"], "by_owner")}, rank)
    for rank in range(now):
        bank = MemoryBank(DIM, options(), seed=3)
        load_rank_state(tmp_path, {"bank": bank.state()}, before, rank, now)
        if (now, rank) in found:
            assert torch.equal(bank.state().tensor, found[now, rank]["state"])
        own = [video for video in VIDEOS if video % now == rank]
        assert set(bank._videos) <= set(own)


def entry(second: int, values: list[float], scores: list[float], tag: float = 2.0) -> SeenKeyframes:
    """Persons of one keyframe of video 7, whose features are one number each."""
    rows = torch.tensor(values)[:, None].expand(-1, DIM).contiguous()
    numbers = (torch.tensor([number]) for number in (7, second, len(values)))
    return SeenKeyframes(*numbers, torch.tensor([tag], dtype=torch.float64), rows, torch.tensor(scores))


def window(bank: MemoryBank, second: int, loss: float | None = None) -> list[float]:
    return bank.windows(torch.tensor([7]), torch.tensor([second]), ALONE, loss)[0, :, 0].tolist()


def test_a_window_goes_from_past_to_future_without_the_keyframe_s_own_second() -> None:
    bank = MemoryBank(DIM, options(), seed=0)
    for second in range(898, 904):
        bank.put(entry(second, [float(second)], [0.9]), ALONE)
    assert window(bank, 900) == [898, 0, 899, 0, 0, 0, 901, 0]


def test_a_window_steps_by_its_rate() -> None:
    bank = MemoryBank(DIM, options(rate=2), seed=0)
    for second in range(895, 904):
        bank.put(entry(second, [float(second)], [0.9]), ALONE)
    assert window(bank, 900) == [896, 0, 898, 0, 0, 0, 902, 0]


def test_the_highest_scores_have_a_place_in_their_order() -> None:
    bank = MemoryBank(DIM, options(), seed=0)
    bank.put(entry(901, [1.0, 2.0, 3.0, 4.0], [0.8, 0.95, 0.81, 0.9]), ALONE)
    assert window(bank, 900)[6:] == [2, 4]


def test_what_comes_later_replaces_and_outlives_what_came_before() -> None:
    bank = MemoryBank(DIM, options(video_seconds=2), seed=0)
    for second, value in ((899, 1.0), (901, 2.0), (899, 3.0), (898, 4.0)):
        bank.put(entry(second, [value], [0.9]), ALONE)
    assert window(bank, 900) == [4, 0, 3, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("loss", "factor"), [(4.0, 0.5), (1.0, 0.5), (2.0, 1.0), (0.0, 0.0)])
def test_features_of_other_weights_count_less(loss: float, factor: float) -> None:
    bank = MemoryBank(DIM, options(), seed=0)
    bank.put(entry(899, [3.0], [0.9], tag=2.0), ALONE)
    assert window(bank, 900, loss)[2] == 3 * factor
    assert penalty(0.0, 0.0) == 1


def test_half_precision_is_kept_and_told() -> None:
    bank = filled(ALONE, options(dtype="float16"))
    windows = asked(bank, ALONE)
    assert windows.dtype == torch.float16
    torch.testing.assert_close(windows.float(), asked(filled(ALONE, options()), ALONE), atol=2e-3, rtol=1e-3)
    other = MemoryBank(DIM, options(), seed=3)
    with pytest.raises(CheckpointError, match="float16.*objective.memory.dtype"):
        other._take([bank.state().tensor], 0, 1)
    with pytest.raises(CheckpointError, match="not the file that a run writes"):
        other._take([torch.zeros(30, dtype=torch.uint8)], 0, 1)


def test_an_empty_bank_gives_empty_windows_and_comes_back() -> None:
    bank = MemoryBank(DIM, options(), seed=0)
    assert window(bank, 900) == [0.0] * 8
    bank.put(entry(900, [], []), ALONE)
    bank._take([bank.state().tensor], 0, 1)
    assert window(bank, 901) == [0.0] * 8


@pytest.mark.parametrize("wrong", [{"past": -1}, {"rate": 0}, {"max_per_second": 0}, {"video_seconds": 0}])
def test_sizes_that_can_not_be_are_named(wrong: dict[str, int]) -> None:
    (name, value), (problem,) = next(iter(wrong.items())), options(**wrong).problems()
    assert f"objective.memory.{name}={value}, allowed" in problem
    assert MemoryOptions().problems() == []
