"""The same numbers and gradients on one, two and four ranks, started once for all tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

WORLDS = [1, 2, 4]
Found = dict[tuple[int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(in_worlds: Callable[[str], Found]) -> Found:
    return in_worlds("tests.runtime.collectives_program")


def every_rank(found: Found, world: int) -> list[dict[str, Any]]:
    return [found[world, rank] for rank in range(world)]


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("world", WORLDS)
def test_rows_come_in_the_order_of_positions(found: Found, world: int) -> None:
    for one in every_rank(found, world):
        order = one["order"]
        for accumulation in (1, 2, 4):
            assert order[f"parts {accumulation}"].tolist() == list(range(16))
            assert order[f"joined {accumulation}"].tolist() == list(range(16))
        assert order["views"].tolist() == [10 * position + view for position in range(16) for view in (0, 1)]
        assert order["own"]
        for kind in (torch.bool, torch.uint8, torch.bfloat16, torch.float64):
            expected = (torch.arange(16) % 3).to(kind)[:, None].expand(-1, 2)
            assert order[f"{kind}"].dtype == kind and torch.equal(order[f"{kind}"], expected)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("world", WORLDS)
def test_a_contrastive_step_is_the_same_on_any_ranks(found: Found, world: int, accumulation: int) -> None:
    expected = found[1, 0]["steps"][1]
    assert all(float(value.abs().max()) > 1e-3 for value in expected["gradients"].values()), "nothing to compare"
    for one in every_rank(found, world):
        step = one["steps"][accumulation]
        assert step["losses"] == pytest.approx([expected["losses"][0]] * accumulation, abs=1e-6)
        assert largest_difference(step["gradients"], expected["gradients"]) < 1e-6


@pytest.mark.parametrize("world", [2, 4])
def test_a_wrong_order_or_a_missing_term_would_be_seen(found: Found, world: int) -> None:
    """The measures of the test above tell a broken gather from a right one."""
    expected = found[1, 0]["steps"][1]
    wrong = found[world, 0]["wrong order"]
    assert abs(wrong["losses"][0] - expected["losses"][0]) > 1e-3
    assert largest_difference(wrong["gradients"], expected["gradients"]) > 1e-3
    official = found[world, 0]["official"][1]
    assert official["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert largest_difference(official["gradients"], expected["gradients"]) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world", WORLDS)
def test_the_official_gradient_is_smaller_by_the_number_of_ranks(found: Found, world: int, accumulation: int) -> None:
    """TVTSv2's gather: each rank's encoder gets its own rows' gradient of one loss, then ranks are averaged."""
    expected = found[1, 0]["steps"][1]["gradients"]
    for one in every_rank(found, world):
        gradients = one["official"][accumulation]["gradients"]
        of_loss, of_encoder = gradients.pop("temperature"), {n: v * world for n, v in gradients.items()}
        assert float((of_loss - expected["temperature"]).abs()) < 1e-6, "not gathered, so not smaller"
        assert largest_difference(of_encoder, {n: v for n, v in expected.items() if n != "temperature"}) < 2e-6


@pytest.mark.parametrize("world", WORLDS)
def test_losses_over_own_rows_have_the_gradient_of_their_mean(found: Found, world: int) -> None:
    expected = found[1, 0]["local"]
    for one in every_rank(found, world):
        assert one["local"]["losses"] == pytest.approx(expected["losses"], abs=1e-6)
        assert largest_difference(one["local"]["gradients"], expected["gradients"]) < 1e-6


@pytest.mark.parametrize("world", WORLDS)
def test_means_over_ranks(found: Found, world: int) -> None:
    """Squares of 1..12 in uneven parts, one of them empty, so that its own mean is NaN."""
    things = torch.arange(1.0, 13.0)
    for one in every_rank(found, world):
        means = one["means"]
        assert means["weighted"] == pytest.approx(650 / 12, rel=1e-6)
        assert torch.allclose(means["weighted gradient"], 3 * 2 * things / 12, rtol=1e-6)
        assert means["plain"] == pytest.approx((world + 1) / 2)
        assert means["plain gradient"] == pytest.approx(world + 1), "d mean**2, the same on each rank"
        assert means["none"] == pytest.approx((4.0, 1.0))
        assert not means["without gradient"]
        assert means["vector"].tolist() == [sum(range(world))] * 2 and means["vector"].dtype == torch.bfloat16


@pytest.mark.parametrize("world", WORLDS)
def test_what_can_not_be_gathered_is_refused_before_ranks_wait(found: Found, world: int) -> None:
    for one in every_rank(found, world):
        rows, gradient = one["refusals"]
        assert "3 rows with 2 views" in rows
        assert "'mean'" in gradient and "sum, official" in gradient
