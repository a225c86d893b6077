"""The order of an epoch: a permutation, in lanes, with weights, over passes."""

from collections import Counter

import numpy as np
import pytest

from pretrain.data.order import EpochOrder, SourceShape, epoch_quotas
from pretrain.errors import DataError, RecipeError


def shapes(*weights: float | None) -> list[SourceShape]:
    counts = [[7, 9, 11, 3], [5, 5, 40], [13]]
    return [SourceShape(f"s{i}", np.array(counts[i]), weight) for i, weight in enumerate(weights)]


def order(sources: list[SourceShape], quotas: list[int], epoch: int = 0, lanes: int = 8, seed: int = 0) -> EpochOrder:
    return EpochOrder(sources, quotas, seed, epoch, lanes, window=4)


def samples(one: EpochOrder) -> list[tuple[int, ...]]:
    columns = one.locate(np.arange(len(one)))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_every_sample_once_but_less_than_lanes_left_out() -> None:
    sources = shapes(None, None, None)
    quotas = epoch_quotas(sources, None)
    seen = Counter((source, shard, row) for source, shard, row, _ in samples(order(sources, quotas)))
    everything = {(s, k, r) for s, one in enumerate(sources) for k, n in enumerate(one.counts) for r in range(n)}
    assert quotas == [30, 50, 13]
    assert set(seen) <= everything and max(seen.values()) == 1
    assert len(everything) - len(seen) == 93 % 8


def test_a_position_is_located_alone_as_in_any_company() -> None:
    sources = shapes(None, None)
    one = order(sources, epoch_quotas(sources, None))
    expected = samples(one)
    fresh = order(sources, epoch_quotas(sources, None))
    for position in np.random.default_rng(0).permutation(len(fresh)):
        assert tuple(int(column[0]) for column in fresh.locate([position])) == expected[position]


def test_order_depends_on_seed_and_epoch_only() -> None:
    sources = shapes(None, None)
    quotas = epoch_quotas(sources, None)
    first = samples(order(sources, quotas))
    assert samples(order(sources, quotas)) == first
    assert samples(order(sources, quotas, seed=1)) != first
    assert [s[:3] for s in samples(order(sources, quotas, epoch=1))] != [s[:3] for s in first]


def test_windows_shuffle_inside_a_lane_only() -> None:
    sources = [SourceShape("s", np.array([64]))]
    one = order(sources, [64], lanes=2)
    rows = one.locate(np.arange(64)).row.reshape(32, 2).T
    for lane, walked in enumerate(rows):
        for window in range(8):
            begin = lane * 32 + window * 4
            assert sorted(walked[window * 4 : window * 4 + 4]) == list(range(begin, begin + 4))
    assert rows.reshape(-1).tolist() != list(range(64))


@pytest.mark.parametrize("quota", [3, 10, 29, 30, 31, 47, 95])
def test_passes_continue_where_the_last_epoch_stopped(quota: int) -> None:
    """Over many epochs each pass uses each sample once, whatever the quota: borders cut shards in two."""
    sources = shapes(None)
    epochs = 90 // quota + 3
    seen: Counter[tuple[int, ...]] = Counter()
    for epoch in range(epochs):
        seen.update(samples(order(sources, [quota], epoch=epoch, lanes=1)))
    assert max(seen.values()) == 1
    whole = epochs * quota // 30
    assert whole >= 1
    per_pass = Counter(number for _, _, _, number in seen)
    assert all(per_pass[number] == 30 for number in range(whole))
    assert sum(per_pass.values()) == epochs * quota


def test_weights_are_shares_of_the_epoch() -> None:
    assert epoch_quotas(shapes(1.0, 2.0, 1.0), 100) == [25, 50, 25]
    assert epoch_quotas(shapes(1.0, 1.0, 1.0), 100) == [34, 33, 33]
    assert epoch_quotas(shapes(0.3, 0.3), None) == [40, 40]
    assert epoch_quotas(shapes(None, None), 8) == [3, 5]
    sources = shapes(3.0, 1.0)
    quotas = epoch_quotas(sources, 80)
    found = Counter(source for source, *_ in samples(order(sources, quotas)))
    assert found == {0: 60, 1: 20}


def test_mistakes_say_what_to_set() -> None:
    with pytest.raises(RecipeError, match="s1 without weight"):
        epoch_quotas(shapes(1.0, None), None)
    with pytest.raises(RecipeError, match="s0=-1.0"):
        epoch_quotas(shapes(-1.0), None)
    with pytest.raises(DataError, match="data.sources.empty"):
        epoch_quotas([SourceShape("empty", np.array([], dtype=np.int64))], None)
    with pytest.raises(DataError, match="data.lanes to at most 30"):
        order(shapes(None), [30], lanes=31)
    with pytest.raises(IndexError):
        order(shapes(None), [30], lanes=3).locate([30])


def test_substitutes_are_a_function_of_position_and_attempt() -> None:
    sources = shapes(None, None)
    one, again = (order(sources, [30, 50]) for _ in range(2))
    drawn = [one.substitute(1, position, attempt) for position in range(40) for attempt in (1, 2, 3)]
    assert drawn == [again.substitute(1, position, attempt) for position in range(40) for attempt in (1, 2, 3)]
    assert all(0 <= row < sources[1].counts[shard] for shard, row in drawn)
    assert len(set(drawn)) > 30
    shard_2 = sum(shard == 2 for shard, _ in drawn)
    assert 70 < shard_2 < 115, "substitutes are uniform over samples: shard 2 holds 40 of 50"


def test_memory_grows_with_shards_not_with_samples() -> None:
    sources = [SourceShape("web", np.full(1000, 1_000_000))]
    one = EpochOrder(sources, epoch_quotas(sources, None), 0, 0, lanes=256, window=1024)
    one.locate(np.arange(0, len(one), len(one) // 500))
    assert len(one) > 999_000_000
    held = one._units.nbytes + sum(drawn.nbytes for _, drawn in one._windows.values())
    assert held < 4e6
