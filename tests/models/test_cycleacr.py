"""CycleACR's head: who has a place beside whom, dropout by position, and what an untrained head does."""

import pytest
import torch

from pretrain.models.cycleacr import CycleACRHead, HeadShape
from pretrain.models.dropout import Rows, draw_by_position
from pretrain.models.interaction import InteractionBlock, PersonPlaces

COUNTS = torch.tensor([2, 0, 3, 1])


def shape(**changed: object) -> HeadShape:
    sizes = dict(inputs=6, times=4, scale=1 / 16, classes=5, dim=8, outputs=6, hidden=7, depth=1, instance_depth=1)
    places = dict(max_persons=4, max_per_second=2, seconds=3, position_codes=True, fusion="add", dropout=0.0)
    return HeadShape(**{**sizes, **places, **changed})  # type: ignore[arg-type]


def persons() -> PersonPlaces:
    return PersonPlaces.of(COUNTS, int(COUNTS.sum()))


def test_persons_know_their_clip_and_place() -> None:
    assert persons().clips.tolist() == [0, 0, 2, 2, 2, 3]
    assert persons().places.tolist() == [0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("size", "places"),
    [
        (4, [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 5, 0], [6, 0, 0, 0]]),
        (2, [[1, 2], [0, 0], [3, 5], [6, 0]]),
        (1, [[2], [0], [5], [6]]),
    ],
)
def test_the_highest_priority_has_a_place(size: int, places: list[list[int]]) -> None:
    """Of more persons than places; in the order of the batch, the rest zero."""
    values = torch.arange(1.0, 7.0)[:, None].requires_grad_()
    table = persons().table(values, size, torch.tensor([0.1, 0.2, 0.5, 0.3, 0.9, 0.7]))
    assert table[..., 0].tolist() == places
    table.sum().backward()
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [float(any(row in one for one in places)) for row in range(1, 7)]


def test_the_first_of_equals_has_a_place() -> None:
    table = persons().table(torch.arange(1.0, 7.0)[:, None], 2, torch.ones(6))
    assert table[..., 0].tolist() == [[1, 2], [0, 0], [3, 4], [6, 0]]


def test_tables_of_clips_are_those_of_their_persons() -> None:
    block = InteractionBlock(8, 6, 0.0, seconds=3)
    for value in block.parameters():
        torch.nn.init.normal_(value, std=0.5)
    x, others = torch.randn(6, 2, 8), torch.randn(4, 6, 8)
    found = block(x, others, persons().clips)
    assert torch.allclose(found, block(x, others[persons().clips]), atol=1e-6)
    assert found.shape == (6, 2, 6)


def test_a_new_block_is_the_identity() -> None:
    x = torch.randn(6, 4, 8)
    assert torch.equal(InteractionBlock(8, 8, 0.5)(x, torch.randn(6, 3, 8)), x)


@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_a_head_trains_all_of_its_weights(fusion: str) -> None:
    head = CycleACRHead(shape(fusion=fusion, dropout=0.2))
    for value in head.parameters():
        torch.nn.init.normal_(value, std=0.3)
    maps = [torch.randn(4, 4, 2, 3, 5, requires_grad=True), torch.randn(4, 2, 4, 3, 5, requires_grad=True)]
    actors = head.actors(maps, torch.rand(6, 4) * 30 + torch.tensor([0, 0, 30, 20]), persons())
    logits = head.classify(actors, persons(), torch.randn(4, 6, 8), torch.ones(6))
    assert logits.shape == (6, 5)
    logits.square().sum().backward()
    without = [name for name, value in head.named_parameters() if value.grad is None or not value.grad.any()]
    # A softmax over keys does not see what is the same for all of them.
    assert all(name.endswith("key.bias") for name in without), without


def dropped(order: list[int]) -> torch.Tensor:
    """Dropout of the persons of clips in some order, as zeros, in the order of the clips."""
    head = CycleACRHead(shape(dropout=0.5)).train()
    rows = draw_by_position(head)
    assert isinstance(rows, Rows)
    counts = COUNTS[order]
    some = PersonPlaces.of(counts, int(counts.sum()))
    rows.keys = torch.tensor([11, 22, 33, 44])[order]
    head._set(some)
    zeros = (head.predictor.dropout(torch.ones(6, 30)) == 0).split(counts.tolist())
    return torch.cat([zeros[order.index(clip)] for clip in range(4)])


def test_dropout_follows_the_clip_and_not_its_place_in_a_batch() -> None:
    first = dropped([0, 1, 2, 3])
    assert 0.3 < float(first.float().mean()) < 0.7
    assert len({tuple(row.tolist()) for row in first}) == 6, "every person has a draw of its own"
    assert torch.equal(first, dropped([3, 2, 0, 1]))
