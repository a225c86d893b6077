"""Micro-batches on their way from a data worker: one piece of shared memory, the same bits."""

from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data import handover
from pretrain.data.handover import ALIGNMENT, BatchPart, Handover, hand_over, join

RNG = np.random.default_rng(0)
#: Three samples of one view; odd sizes, so that a tensor would begin anywhere if nobody saw to it.
COLUMNS: dict[str, list[np.ndarray]] = {
    "video": [RNG.integers(256, size=(1, 3, 5, 7, 3), dtype=np.uint8) for _ in range(3)],
    "weight": [RNG.random((1, 5)).astype(np.float32) for _ in range(3)],
    "flags": [RNG.random((1, 3)) > 0.5 for _ in range(3)],
    "nothing": [np.empty((1, 0), np.int64) for _ in range(3)],
    "position": [np.arange(3)],
}


@pytest.fixture
def in_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "get_worker_info", object)


def outside() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in COLUMNS.items()}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        else:
            assert found[name] == value


def test_a_worker_joins_in_one_shared_memory(in_worker: None) -> None:
    found = join(COLUMNS)
    assert_equal(found, outside())
    assert all(tensor.is_shared() for tensor in found.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found.values() if tensor.numel())


def test_outside_of_workers_nothing_is_shared_and_one_array_is_not_copied() -> None:
    found = join(COLUMNS)
    assert_equal(found, outside())
    assert not any(tensor.is_shared() for tensor in found.values())
    assert np.shares_memory(found["position"].numpy(), COLUMNS["position"][0])
    batch = found | {"key": ["a", "b", "c"]}
    assert hand_over(batch) is batch


def test_what_a_kind_of_sample_adds_travels_beside(in_worker: None) -> None:
    """Under every name as it was, in the order of the batch; a view with gaps can't be told by offset and shape."""
    joined = join(COLUMNS)
    batch = {"first": torch.ones(3), **joined, "seen": joined["weight"][:, ::2], "key": ["a", "b", "c"]}
    sent = hand_over(batch)
    assert isinstance(sent, Handover)
    assert [name for name, entry in sent.entries.items() if isinstance(entry, BatchPart)] == list(COLUMNS)
    assert_equal(sent.batch(), batch)
    video = sent.batch()["video"]
    assert video.data_ptr() == joined["video"].data_ptr()


def test_arrays_that_were_joined_apart(in_worker: None) -> None:
    batch: dict[str, Any] = join({"small": [np.zeros(2)]}) | join(COLUMNS)
    sent = hand_over(batch)
    assert isinstance(sent, Handover) and isinstance(sent.entries["small"], torch.Tensor)
    assert_equal(sent.batch(), batch)


def test_pinned_in_one_piece(in_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = join(COLUMNS) | {"own": torch.ones(2)}
    sent = hand_over(batch)
    assert isinstance(sent, Handover)
    assert_equal(sent.pin_memory().batch(), batch)
    assert [tensor.dtype for tensor in pinned] == [torch.float32, torch.uint8]
