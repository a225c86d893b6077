"""Micro-batches one ahead: the order, the errors and the end of a stream stay what they are without."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pretrain.data.samples import Batch
from pretrain.engine import prefetch
from pretrain.engine.batches import MicroBatches
from pretrain.engine.prefetch import ON_DEVICE, Arrival, Prefetcher, arrivals, on_device
from pretrain.errors import DataError
from pretrain.runtime.process_group import Ranks

CPU = torch.device("cpu")


class Stream:
    """Numbered micro-batches; an error in place of one of them, and a pause before others."""

    def __init__(self, bad: int = -1) -> None:
        self.bad, self.fetched, self.closed = bad, 0, False
        self.may_go_on = threading.Semaphore(100)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        assert not self.closed
        self.may_go_on.acquire()
        if self.fetched == self.bad:
            raise DataError("the shard is gone")
        self.fetched += 1
        numbers = torch.full((2,), self.fetched - 1)
        return {"video": numbers, "source": numbers * 0, "view": numbers * 0, "bad": [], "key": ["a", "b"]}

    def source_of(self, step: int) -> str:
        return ""

    def close(self) -> None:
        self.closed = True


class Copied:
    """An arrival where nothing has to be copied."""

    def __init__(self, batch: Batch) -> None:
        self.batch = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}

    def take(self) -> Batch:
        return self.batch


def copying() -> Callable[[Batch], Any]:
    assert threading.current_thread().name == "prefetch"
    return Copied


def micro_batches(stream: Any) -> MicroBatches:
    """As an accelerator has them."""
    batches = MicroBatches(stream, CPU)
    batches._prefetcher = Prefetcher(stream, copying)
    return batches


def test_one_is_ahead_and_no_more() -> None:
    stream = Stream()
    stream.may_go_on = threading.Semaphore(1)
    batches = Prefetcher(stream, copying)
    assert stream.fetched == 0
    # Given out although the second is not there yet: a step must not wait for the data of the next.
    assert next(batches)["video"].tolist() == [0, 0] and stream.fetched == 1
    stream.may_go_on.release(5)
    for number in range(1, 4):
        assert next(batches)["video"].tolist() == [number] * 2
        assert stream.fetched <= number + 2
    batches.close()
    assert stream.fetched == 5 and not batches._thread.is_alive()


def test_an_error_belongs_to_its_own_micro_batch() -> None:
    stream = Stream(bad=2)
    batches = micro_batches(stream)
    assert next(batches)["video"].tolist() == [0, 0]
    last = next(batches)
    assert batches._prefetcher is not None
    batches._prefetcher._thread.join(10.0)  # by now the thread knows that there is no third
    assert batches.error is None, "the step of the second would be taken for one without data"
    stand_in = next(batches)
    assert str(batches.error) == "the shard is gone" and next(batches)["key"] == ["a", "b"]
    assert torch.equal(stand_in["video"], last["video"]) and not len(stand_in["source"])
    assert ON_DEVICE in last and ON_DEVICE not in stand_in
    batches.close()
    assert stream.closed


def test_an_error_of_the_first_is_raised_each_time() -> None:
    batches = micro_batches(Stream(bad=0))
    for _ in range(2):
        with pytest.raises(DataError, match="the shard is gone"):
            next(batches)


def test_closing_ends_the_thread() -> None:
    """A rewind opens another stream: two threads would fetch for one run."""
    batches = micro_batches(Stream())
    next(batches)
    batches.close()
    assert batches._prefetcher is not None and not batches._prefetcher._thread.is_alive()


def test_the_end_does_not_wait_for_a_stream_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LEAVE_S", 0.1)
    stream = Stream()
    stream.may_go_on = threading.Semaphore(1)
    ahead = Prefetcher(stream, copying)
    next(ahead)
    closing = threading.Thread(target=ahead.close, daemon=True)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()
    stream.may_go_on.release()


def test_a_stream_that_was_never_asked_is_closed() -> None:
    stream = Stream()
    micro_batches(stream).close()
    assert stream.closed and stream.fetched == 0


def test_on_a_cpu_nothing_is_ahead() -> None:
    stream = Stream()
    batches = MicroBatches(stream, CPU)  # type: ignore[arg-type]
    first = next(batches)
    assert stream.fetched == 1 and ON_DEVICE not in first
    assert on_device(first, CPU)["video"] is first["video"]


def test_what_is_added_later_follows() -> None:
    batch = next(micro_batches(Stream())) | {"row_keys": torch.ones(2)}
    there = on_device(batch, CPU)
    assert there["row_keys"] is batch["row_keys"] and there["key"] == ["a", "b"] and ON_DEVICE not in there
    assert there["video"] is batch[ON_DEVICE].take()["video"] and there["video"] is not batch["video"]


class Recorded:
    """torch's streams and events, which say what they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.stream = "compute"
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: self.say(f"device {device}"))
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: self)
        monkeypatch.setattr(torch, "Stream", lambda device: self)
        monkeypatch.setattr(torch, "Event", lambda device: self)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.say("in use"))
        monkeypatch.setattr(prefetch, "to_device", self.copied)

    def say(self, what: str) -> None:
        self.calls.append(f"{self.stream}: {what}")

    def copied(self, batch: Batch, device: torch.device) -> Batch:
        self.say("copied")
        return dict(batch)

    def __enter__(self) -> None:
        self.stream = "side"

    def __exit__(self, *_: object) -> None:
        self.stream = "compute"

    def record(self) -> None:
        self.say("recorded")

    def wait_event(self, event: Any) -> None:
        self.say("waits")


def test_copies_have_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: what the step queues waits for the copy, and memory is not reused before it is done."""
    recorded = Recorded(monkeypatch)
    arrival = arrivals(torch.device("cuda", 1))({"video": torch.ones(2), "key": ["a"]})
    assert isinstance(arrival, Arrival) and arrival.take()["key"] == ["a"]
    assert recorded.calls == ["compute: device cuda:1", "side: copied", "side: recorded", "compute: waits",
                              "compute: in use"]  # fmt: skip


def test_ranks_of_accelerators_are_ahead() -> None:
    ranks = Ranks(0, 1, 0, torch.device("cuda", 0))
    assert MicroBatches(Stream(), ranks.device)._prefetcher is not None  # type: ignore[arg-type]
