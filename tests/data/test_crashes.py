"""A sample that crashes or hangs its decoder costs itself, not the run; a worker that is killed ends it."""

import dataclasses
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Place, Samples, SourceInfo
from pretrain.data.stream import TrainStream
from pretrain.errors import DataError
from pretrain.objectives.base import method_of
from tests.streams import training_stream

MakeRecipe = Callable[..., Any]
STEPS = 3


@dataclasses.dataclass
class Deadly(Samples):
    """Ordinary samples, but some samples kill the process that makes them, or keep it for ever."""

    samples: Samples
    ends: dict[str, str]

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        end = self.ends.get(members.key)
        if end == "hang":
            time.sleep(1000)
        if end:
            os.kill(os.getpid(), getattr(signal, end))
            time.sleep(1000)
        return self.samples(place, source, members)

    def example(self, count: int) -> Batch:
        return self.samples.example(count)


def open_stream(recipe: Any, ends: dict[str, str]) -> TrainStream:
    return training_stream(recipe, samples=Deadly(method_of(recipe).samples(), ends))


def take(stream: TrainStream) -> list[dict[str, Any]]:
    batches = [next(stream) for _ in range(STEPS * stream.accumulation)]
    stream.close()
    return batches


def test_crash_and_hang_cost_the_sample_only(
    make_recipe: MakeRecipe, two_sources: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = take(open_stream(make_recipe({"b": two_sources["b"]}, samples=4), {}))
    keys = [key for batch in undisturbed for key in batch["key"]]
    ends = {keys[3]: "SIGSEGV", keys[8]: "hang"}
    recipe = make_recipe({"b": two_sources["b"]}, samples=4, workers=1, deadline_s=5.0)
    with caplog.at_level(logging.WARNING):
        batches = take(open_stream(recipe, ends))
    found = [key for batch in batches for key in batch["key"]]
    assert [new for new, old in zip(found, keys, strict=True) if old not in ends] == [k for k in keys if k not in ends]
    assert not set(found) & ends.keys()
    bad = {record.key: record.reason for batch in batches for record in batch["bad"]}
    assert bad == dict.fromkeys(ends, "crash")
    assert caplog.text.count("killed the data worker that decoded it") == 2


@pytest.mark.faults
def test_a_worker_that_is_killed_from_outside_ends_the_run(
    make_recipe: MakeRecipe, two_sources: dict[str, str]
) -> None:
    """As the kernel does when memory runs out: no sample is to blame, and starting again would hide it.

    In `make test` a worker is killed in test_stream.py, while the rank waits for it.
    """
    stream = open_stream(make_recipe({"b": two_sources["b"]}, samples=4, workers=1), {})
    next(stream)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(DataError, match="a data worker died .* Killed for memory"):
        for _ in range(100):
            next(stream)
    stream.close()
